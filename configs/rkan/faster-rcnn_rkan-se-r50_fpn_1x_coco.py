_base_ = ['./faster-rcnn_se-r50_fpn_1x_coco.py']

model = dict(backbone=dict(type='RKANResNet', rkan=dict(zero_init=True)))
