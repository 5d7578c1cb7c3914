_base_ = ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py']
custom_imports = dict(imports=['rkan_mmdet'])

model = dict(backbone=dict(type='RKANResNet', rkan=dict(expand_factor=6, zero_init=True)))
