_base_ = ['./r50_authors-100e_in1k.py']

model = dict(backbone=dict(type='RKANResNet', depth=101))
