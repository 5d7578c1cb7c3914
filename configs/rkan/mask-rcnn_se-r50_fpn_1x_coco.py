_base_ = ['mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py']
custom_imports = dict(imports=['rkan_mmdet'])

# The squeeze-and-excitation is new beside torchvision's weights, so no stage that holds it may be frozen.
model = dict(
    backbone=dict(frozen_stages=0, plugins=[dict(cfg=dict(type='SEPlugin', ratio=16), position='after_conv3')])
)
