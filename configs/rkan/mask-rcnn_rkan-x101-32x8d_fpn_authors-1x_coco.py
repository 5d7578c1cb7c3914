_base_ = ['./mask-rcnn_r50_fpn_authors-1x_coco.py']

model = dict(
    backbone=dict(
        type='RKANResNeXt',
        depth=101,
        groups=32,
        base_width=8,
        init_cfg=dict(checkpoint='work_dirs/rkan-x101-32x8d_authors-100e_in1k/epoch_100.pth'),
    )
)
