# A user's backbone with a layer of its own: trains; its checkpoint must load again.
_base_ = './base.py'
custom_imports = dict(imports=['lska_mm', 'modules'], allow_failed_imports=False)
model = dict(backbone=dict(type='AdaptedLSKAVAN'))
