_base_ = ['./r50_authors-100e_in1k.py']

model = dict(backbone=dict(plugins=[dict(cfg=dict(type='SEPlugin', ratio=16), position='after_conv3')]))
