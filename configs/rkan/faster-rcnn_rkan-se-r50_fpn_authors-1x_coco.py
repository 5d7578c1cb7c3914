_base_ = ['./faster-rcnn_r50_fpn_authors-1x_coco.py']

model = dict(
    backbone=dict(
        type='RKANResNet',
        plugins=[dict(cfg=dict(type='SEPlugin', ratio=16), position='after_conv3')],
        init_cfg=dict(checkpoint='work_dirs/rkan-se-r50_authors-100e_in1k/epoch_100.pth'),
    )
)
