# The study's detector on photographs of blood cells: as on shapes, with boxes alone, for 592 iterations.
_base_ = ['./mask-rcnn_r18_fpn_shapes.py']

classes = ('RBC', 'WBC', 'Platelets')
data_root = 'data/bccd/'
image_size = (320, 240)
model = dict(
    type='FasterRCNN',
    roi_head=dict(bbox_head=dict(num_classes=3), mask_roi_extractor=None, mask_head=None),
    test_cfg=dict(rcnn=dict(max_per_img=60)),
)
train_pipeline = _base_.train_pipeline
test_pipeline = _base_.test_pipeline
train_pipeline[1] = test_pipeline[2] = dict(type='LoadAnnotations', with_bbox=True)
train_pipeline[2]['scale'] = test_pipeline[1]['scale'] = image_size
data = dict(data_root=data_root, metainfo=dict(classes=classes))
train_dataloader = dict(dataset=dict(**data, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(**data, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json', metric='bbox')
test_evaluator = val_evaluator

max_epochs = 16
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(end=max_epochs, T_max=max_epochs)
default_hooks = dict(checkpoint=dict(interval=max_epochs, max_keep_ckpts=1))
