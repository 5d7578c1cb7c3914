_base_ = ['./faster-rcnn_r50_fpn_authors-1x_coco.py']

model = dict(
    backbone=dict(
        type='RKANResNet',
        rkan=dict(expand_factor=6),
        init_cfg=dict(checkpoint='work_dirs/rkan-r50-6xl_authors-100e_in1k/epoch_100.pth'),
    )
)
