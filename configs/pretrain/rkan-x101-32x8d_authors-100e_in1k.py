_base_ = ['./r50_authors-100e_in1k.py']

model = dict(backbone=dict(type='RKANResNeXt', depth=101, groups=32, base_width=8))
