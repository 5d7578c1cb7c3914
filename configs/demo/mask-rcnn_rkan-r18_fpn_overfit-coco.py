# The demo's model on real photographs: learns a few images of COCO by heart, and is scored on those. For COCO-layout
# folders of some dozens of images, named by --cfg-options data_root=DIR or MMDET_DATASETS=DIR.
_base_ = ['./mask-rcnn_rkan-r18_fpn_shapes.py']

data_root = 'data/coco/'
image_size = (320, 320)

model = dict(
    roi_head=dict(bbox_head=dict(num_classes=80), mask_head=dict(num_classes=80)),
    test_cfg=dict(rcnn=dict(max_per_img=100)),
)

# no flip: what is to be learned by heart is what is scored
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=image_size, keep_ratio=True),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=image_size, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
coco = dict(
    type='CocoDataset',
    data_root=data_root,
    ann_file='annotations/instances_train2017.json',
    data_prefix=dict(img='train2017/'),
)
train_dataloader = dict(
    batch_size=4,
    # an epoch of ten passes: the set is small, and the loop's hooks cost time
    dataset=dict(
        _delete_=True,
        type='RepeatDataset',
        times=10,
        dataset=dict(**coco, filter_cfg=dict(filter_empty_gt=False), pipeline=train_pipeline),
    ),
)
val_dataloader = dict(dataset=dict(_delete_=True, **coco, test_mode=True, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_train2017.json')
test_evaluator = val_evaluator

max_epochs = 13
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineAnnealingLR',
        eta_min_ratio=0.02,
        begin=0,
        end=max_epochs,
        T_max=max_epochs,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
