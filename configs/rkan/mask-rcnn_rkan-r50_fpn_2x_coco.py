_base_ = ['mmdet::mask_rcnn/mask-rcnn_r50_fpn_2x_coco.py']
custom_imports = dict(imports=['rkan_mmdet'])

model = dict(backbone=dict(type='RKANResNet', rkan=dict(zero_init=True)))
