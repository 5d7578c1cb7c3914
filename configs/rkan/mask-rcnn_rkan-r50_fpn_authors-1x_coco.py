_base_ = ['./mask-rcnn_r50_fpn_authors-1x_coco.py']

model = dict(
    backbone=dict(type='RKANResNet', init_cfg=dict(checkpoint='work_dirs/rkan-r50_authors-100e_in1k/epoch_100.pth'))
)
