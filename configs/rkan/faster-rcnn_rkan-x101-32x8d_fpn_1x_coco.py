_base_ = ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py']
custom_imports = dict(imports=['rkan_mmdet'])

# MMDetection has no plain 1x config of this; weights, their normalization and fixed BN are those of its Mask R-CNN.
model = dict(
    data_preprocessor=dict(mean=[103.530, 116.280, 123.675], std=[57.375, 57.120, 58.395], bgr_to_rgb=False),
    backbone=dict(
        type='RKANResNeXt',
        depth=101,
        groups=32,
        base_width=8,
        norm_cfg=dict(requires_grad=False),
        rkan=dict(zero_init=True),
        init_cfg=dict(checkpoint='open-mmlab://detectron2/resnext101_32x8d'),
    ),
)
