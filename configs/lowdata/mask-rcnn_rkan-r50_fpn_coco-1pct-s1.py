_base_ = ['./mask-rcnn_r50_fpn_coco-1pct-s1.py']

model = dict(backbone=dict(type='RKANResNet', rkan=dict(zero_init=True)))
