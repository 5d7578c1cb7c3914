_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    'mmdet::_base_/default_runtime.py',
    './_base_/authors-1x.py',
]
custom_imports = dict(imports=['rkan_mmdet'])

model = dict(
    # the output of the pre-training on ImageNet-1k of this very backbone
    backbone=dict(
        **_base_.authors_backbone,
        init_cfg=dict(checkpoint='work_dirs/r50_authors-100e_in1k/epoch_100.pth', prefix='backbone.'),
    ),
    rpn_head=_base_.authors_rpn_head,
    train_cfg=dict(rcnn=dict(assigner=dict(match_low_quality=False))),
)
train_dataloader = _base_.authors_train_dataloader
val_dataloader = _base_.authors_test_dataloader
test_dataloader = val_dataloader
