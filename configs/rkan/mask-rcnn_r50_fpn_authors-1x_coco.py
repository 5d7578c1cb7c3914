_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    'mmdet::_base_/default_runtime.py',
    './_base_/authors-1x.py',
]
custom_imports = dict(imports=['rkan_mmdet'])

model = dict(
    backbone=dict(
        frozen_stages=-1,
        norm_eval=False,
        # the output of the pre-training on ImageNet-1k of this very backbone
        init_cfg=dict(_delete_=True, type='Pretrained', checkpoint='work_dirs/r50_in1k/backbone.pth'),
    ),
    # torchvision's: every size at every level, 15 anchors a location
    rpn_head=dict(anchor_generator=dict(base_sizes=[1] * 5, scales=[32, 64, 128, 256, 512])),
)

train_pipeline = _base_.authors_train_pipeline
test_pipeline = _base_.authors_test_pipeline
train_dataloader = dict(
    batch_size=8,
    num_workers=8,
    dataset=dict(filter_cfg=dict(filter_empty_gt=False, min_size=0), pipeline=train_pipeline),
)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
