_base_ = [
    'mmdet::_base_/models/faster-rcnn_r50_fpn.py',
    'mmdet::_base_/datasets/voc0712.py',
    'mmdet::_base_/default_runtime.py',
    './_base_/authors-1x.py',
]
custom_imports = dict(imports=['rkan_mmdet'])

# As on COCO, with VOC's 20 classes; trainval of 2007 and 2012, mAP at 0.5 on test of 2007. Objects
# marked difficult are neither trained on nor counted (MMDetection's and VOC's rule; the authors keep them).
model = dict(
    backbone=dict(
        **_base_.authors_backbone,
        init_cfg=dict(checkpoint='work_dirs/r50_authors-100e_in1k/epoch_100.pth', prefix='backbone.'),
    ),
    rpn_head=_base_.authors_rpn_head,
    roi_head=dict(bbox_head=dict(num_classes=20)),
)

train_pipeline = _base_.authors_train_pipeline
test_pipeline = _base_.authors_test_pipeline
train_pipeline[1]['with_mask'] = test_pipeline[2]['with_mask'] = False
voc = dict(
    type='VOCDataset', data_root='data/VOCdevkit/', filter_cfg=_base_.authors_filter_cfg, pipeline=train_pipeline
)
train_dataloader = dict(
    batch_size=8,
    num_workers=8,
    dataset=dict(
        _delete_=True,
        type='ConcatDataset',
        ignore_keys=['dataset_type'],
        datasets=[
            dict(
                **voc, ann_file=f'VOC{year}/ImageSets/Main/trainval.txt', data_prefix=dict(sub_data_root=f'VOC{year}/')
            )
            for year in (2007, 2012)
        ],
    ),
)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
