_base_ = './retinanet_lska-van-tiny_fpn_1x_coco.py'

model = dict(
    backbone=dict(
        arch='small',
        init_cfg=dict(checkpoint='{{$LSKA_PRETRAINED:pretrained}}/lska-van-small_k23_in1k.pth'),
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
