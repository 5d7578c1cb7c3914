# The study's detector on drawn shapes: the demo's, for 600 iterations (benchmarks/study.py changes the backbone alone).
_base_ = ['../demo/mask-rcnn_rkan-r18_fpn_shapes.py']

model = dict(backbone=dict(stage_with_rkan=(False, False, False, False)))
data_root = 'data/study_shapes/'
train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
figures = ['mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l']
figures += ['AR@100', 'AR@300', 'AR@1000', 'AR_s@1000', 'AR_m@1000', 'AR_l@1000']
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json', metric_items=figures)
test_evaluator = val_evaluator

max_epochs = 4
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(end=max_epochs, T_max=max_epochs)
default_hooks = dict(checkpoint=dict(interval=max_epochs, max_keep_ckpts=1))
