_base_ = ['mmdet::faster_rcnn/faster-rcnn_x101-32x4d_fpn_1x_coco.py']
custom_imports = dict(imports=['rkan_mmdet'])

model = dict(backbone=dict(type='RKANResNeXt', rkan=dict(zero_init=True)))
