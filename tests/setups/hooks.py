# Hooks that look at the dataloader and change its pipeline.
_base_ = './base.py'
custom_imports = dict(imports=['lska_mm', 'modules'], allow_failed_imports=False)
custom_hooks = [
    dict(type='ReadsTheDataloader'),
    dict(type='PipelineSwitchHook', switch_epoch=0, switch_pipeline=_base_.pipeline),
]
