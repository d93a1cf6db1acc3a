_base_ = './lska-van-base_4xb128_in1k.py'

model = dict(backbone=dict(kernel_size=35))
