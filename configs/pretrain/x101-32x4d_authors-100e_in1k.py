_base_ = ['./r50_authors-100e_in1k.py']

model = dict(backbone=dict(type='mmdet.ResNeXt', depth=101, groups=32, base_width=4))
