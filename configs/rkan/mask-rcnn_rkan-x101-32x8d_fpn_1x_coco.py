_base_ = ['mmdet::mask_rcnn/mask-rcnn_x101-32x8d_fpn_1x_coco.py']
custom_imports = dict(imports=['rkan_mmdet'])

model = dict(backbone=dict(type='RKANResNeXt', rkan=dict(zero_init=True)))
