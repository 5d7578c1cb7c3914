_base_ = ['mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py']
custom_imports = dict(imports=['rkan_mmdet'])

# The plain backbone is frozen whole; path, neck and heads are trained.
model = dict(backbone=dict(type='RKANResNet', frozen_stages=4, rkan=dict(zero_init=True, adapter=True)))
