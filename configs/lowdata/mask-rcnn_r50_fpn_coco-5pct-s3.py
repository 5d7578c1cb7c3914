_base_ = ['./mask-rcnn_r50_fpn_coco-5pct-s1.py']

train_dataloader = dict(dataset=dict(dataset=dict(ann_file='semi_anns/instances_train2017.3@5.json')))
randomness = dict(seed=3)
