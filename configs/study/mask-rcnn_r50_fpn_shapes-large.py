# The study's larger row, for a GPU: a whole ResNet-50 with a neck and heads of MMDetection's width, larger images.
_base_ = ['./mask-rcnn_r18_fpn_shapes.py']

data_root = 'data/study_shapes-large/'
image_size = (384, 384)
model = dict(
    backbone=dict(depth=50, base_channels=64, stem_channels=64),
    neck=dict(in_channels=[256, 512, 1024, 2048], out_channels=256),
    rpn_head=dict(in_channels=256, feat_channels=256),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=256),
        bbox_head=dict(in_channels=256, fc_out_channels=1024),
        mask_roi_extractor=dict(out_channels=256),
        mask_head=dict(num_convs=4, in_channels=256, conv_out_channels=256),
    ),
    train_cfg=dict(rcnn=dict(sampler=dict(num=128))),
)
train_pipeline = _base_.train_pipeline
test_pipeline = _base_.test_pipeline
train_pipeline[2]['scale'] = test_pipeline[1]['scale'] = image_size
data = dict(data_root=data_root)
train_dataloader = dict(batch_size=16, num_workers=2, dataset=dict(**data, pipeline=train_pipeline))
val_dataloader = dict(num_workers=2, dataset=dict(**data, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
test_evaluator = val_evaluator

optim_wrapper = dict(optimizer=dict(lr=5e-4))
max_epochs = 3
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(end=max_epochs, T_max=max_epochs)
default_hooks = dict(checkpoint=dict(interval=max_epochs))
