_base_ = ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py']
custom_imports = dict(imports=['rkan_mmdet'])

# MMDetection's recipe and pretrained weights; the path starts at zero, so that training starts from the plain detector.
model = dict(backbone=dict(type='RKANResNet', stage_with_rkan=(False, False, False, True), rkan=dict(zero_init=True)))
