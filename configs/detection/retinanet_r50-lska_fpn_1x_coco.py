_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['lska_mm'], allow_failed_imports=False)
custom_hooks = [dict(type='NumClassCheckHook')]

model = dict(
    backbone=dict(
        plugins=[
            dict(
                cfg=dict(
                    type='LSKA',
                    kernel_size=23,
                    # The gate starts as a factor of 1: training starts from the ImageNet network.
                    init_cfg=dict(type='Constant', val=0, bias=1, override=dict(name='conv1')),
                ),
                stages=(False, True, True, True),  # the first is frozen
                position='after_conv2',
            )
        ]
    )
)
