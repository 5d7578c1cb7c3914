# The authors' recipe, as far as MMDetection's parts go; docs/recipes.md lists item by item what differs.
# Batch 8 in all: 8 images on one GPU. Mixed precision needs a GPU.
max_epochs = 12
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
param_scheduler = [dict(type='MultiStepLR', begin=0, end=max_epochs, by_epoch=True, milestones=[8, 11], gamma=0.1)]
optim_wrapper = dict(
    type='AmpOptimWrapper',
    loss_scale='dynamic',
    optimizer=dict(type='SGD', lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.0001),
)
auto_scale_lr = dict(enable=False, base_batch_size=8)

authors_train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='FilterAnnotations', min_gt_bbox_wh=(2, 2), keep_empty=False),
    dict(type='Resize', scale=(1066, 640), keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(
        type='RandomApply',
        prob=0.3,
        transforms=[
            *(dict(type=kind, min_mag=0.8, max_mag=1.2) for kind in ('Brightness', 'Contrast', 'Color')),
            # 18 of 180: a tenth of a turn
            dict(type='YOLOXHSVRandomAug', hue_delta=18, saturation_delta=0, value_delta=0),
        ],
    ),
    dict(type='PackDetInputs'),
]
authors_test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(1066, 640), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]

# What the plain models set once: nothing is frozen, BN is in training mode.
authors_backbone = dict(frozen_stages=-1, norm_eval=False)
# torchvision's: every size at every level, 15 anchors a location
authors_rpn_head = dict(anchor_generator=dict(base_sizes=[1] * 5, scales=[32, 64, 128, 256, 512]))
authors_filter_cfg = dict(filter_empty_gt=False, min_size=0)
authors_train_dataloader = dict(
    batch_size=8, num_workers=8, dataset=dict(filter_cfg=authors_filter_cfg, pipeline=authors_train_pipeline)
)
authors_test_dataloader = dict(dataset=dict(pipeline=authors_test_pipeline))
