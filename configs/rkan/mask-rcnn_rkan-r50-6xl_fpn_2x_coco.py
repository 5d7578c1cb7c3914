_base_ = ['./mask-rcnn_rkan-r50_fpn_2x_coco.py']

model = dict(backbone=dict(rkan=dict(expand_factor=6)))
