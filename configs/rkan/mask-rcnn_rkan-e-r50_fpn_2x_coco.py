_base_ = ['./mask-rcnn_rkan-r50_fpn_2x_coco.py']

model = dict(backbone=dict(stage_with_rkan=(False, False, True, True)))
