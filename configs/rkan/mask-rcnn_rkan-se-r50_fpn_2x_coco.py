_base_ = ['./mask-rcnn_se-r50_fpn_2x_coco.py']

model = dict(backbone=dict(type='RKANResNet', rkan=dict(zero_init=True)))
