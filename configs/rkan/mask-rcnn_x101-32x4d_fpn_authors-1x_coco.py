_base_ = ['./mask-rcnn_r50_fpn_authors-1x_coco.py']

model = dict(
    backbone=dict(
        type='ResNeXt',
        depth=101,
        groups=32,
        base_width=4,
        init_cfg=dict(checkpoint='work_dirs/x101-32x4d_authors-100e_in1k/epoch_100.pth'),
    )
)
