# ImageNet-1k pre-training by the authors' recipe (docs/recipes.md): 100 epochs, batch 128 in all (one GPU), 224 px.
# Runs with MMPretrain; parses without it.
custom_imports = dict(imports=['rkan_mmdet'])
default_scope = 'mmpretrain'

model = dict(
    type='ImageClassifier',
    # MMDetection's class: the keys are the detector's; its initialisation is torchvision's but for zero_init_residual
    backbone=dict(type='mmdet.ResNet', depth=50, out_indices=(3,), norm_eval=False, zero_init_residual=False),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=2048,
        loss=dict(type='CrossEntropyLoss', use_soft=True),  # CutMix and MixUp give soft labels
        topk=(1, 5),
        # torch's own initialisation of a linear layer
        init_cfg=None,
    ),
    # a batch is cut, or else mixed, or else left alone
    train_cfg=dict(augments=[dict(type='CutMix', alpha=1.0), dict(type='Mixup', alpha=0.2)], probs=[0.5, 0.3]),
)
data_preprocessor = dict(
    num_classes=1000, mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True, to_onehot=True
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=224, backend='pillow'),  # against aliasing, as torchvision does
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    # torchvision's RandAugment(num_ops=2, magnitude=9), whose magnitudes go from 0 to 30
    dict(
        type='RandAugment',
        num_policies=2,
        magnitude_level=9,
        total_level=30,
        hparams=dict(pad_val=0, interpolation='nearest', prob=1.0),
        policies=[
            dict(type='Invert', prob=0.0),  # the identity
            dict(type='Shear', magnitude_range=(0, 0.3), direction='horizontal'),
            dict(type='Shear', magnitude_range=(0, 0.3), direction='vertical'),
            dict(type='Translate', magnitude_range=(0, 150 / 331), direction='horizontal'),
            dict(type='Translate', magnitude_range=(0, 150 / 331), direction='vertical'),
            dict(type='Rotate', magnitude_range=(0, 30)),
            dict(type='Brightness', magnitude_range=(0, 0.9)),
            dict(type='ColorTransform', magnitude_range=(0, 0.9)),
            dict(type='Contrast', magnitude_range=(0, 0.9)),
            dict(type='Sharpness', magnitude_range=(0, 0.9)),
            dict(type='Posterize', magnitude_range=(8, 4)),
            dict(type='Solarize', magnitude_range=(255, 0)),
            dict(type='AutoContrast'),
            dict(type='Equalize'),
        ],
    ),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=256, edge='short', backend='pillow'),
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackInputs'),
]
data_root = 'data/imagenet/'
train_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    dataset=dict(type='ImageNet', data_root=data_root, split='train', pipeline=train_pipeline),
    sampler=dict(type='DefaultSampler', shuffle=True),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    dataset=dict(type='ImageNet', data_root=data_root, split='val', pipeline=test_pipeline),
    sampler=dict(type='DefaultSampler', shuffle=False),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=(1, 5))
test_evaluator = val_evaluator

# weight decay on every parameter; mixed precision needs a GPU
optim_wrapper = dict(
    type='AmpOptimWrapper',
    loss_scale='dynamic',
    optimizer=dict(type='SGD', lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.0001),
)
# epoch e of the warm-up has (e + 1) / 10 of the learning rate
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, begin=0, end=10, by_epoch=True),
    dict(type='CosineAnnealingLR', T_max=90, eta_min=1e-5, begin=10, end=100, by_epoch=True),
]
train_cfg = dict(by_epoch=True, max_epochs=100, val_interval=1)
val_cfg = dict()
test_cfg = dict()
auto_scale_lr = dict(enable=False, base_batch_size=128)

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=100),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=3, save_best='auto'),
    sampler_seed=dict(type='DistSamplerSeedHook'),
)
env_cfg = dict(
    cudnn_benchmark=True, mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0), dist_cfg=dict(backend='nccl')
)
log_level = 'INFO'
load_from = None
resume = False
