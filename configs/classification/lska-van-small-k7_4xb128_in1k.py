_base_ = './lska-van-small_4xb128_in1k.py'

model = dict(backbone=dict(kernel_size=7))
