_base_ = './lska-van-tiny_4xb128_in1k.py'

model = dict(backbone=dict(kernel_size=7))
