_base_ = ['mmdet::faster_rcnn/faster-rcnn_r101_fpn_2x_coco.py']
custom_imports = dict(imports=['rkan_mmdet'])

model = dict(backbone=dict(type='RKANResNet', rkan=dict(zero_init=True)))
