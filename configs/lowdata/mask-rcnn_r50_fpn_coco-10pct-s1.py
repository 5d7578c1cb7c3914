_base_ = ['./mask-rcnn_r50_fpn_coco-1pct-s1.py']

train_dataloader = dict(dataset=dict(times=2, dataset=dict(ann_file='semi_anns/instances_train2017.1@10.json')))
