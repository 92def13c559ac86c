"""The optimizers by name in MMEngine's configs, once this module is imported.

Registered are the reference's names and those that torch does not have. ``gcfunc.optim.SGD`` and
the others that torch has too go by their full names, for which MMEngine needs no registration.

Example, of a config::

    custom_imports = dict(imports=["gcfunc.integrations.mmengine"])
    optim_wrapper = dict(optimizer=dict(type="SGD_GC", lr=0.1, momentum=0.9))
    # or: optimizer=dict(type="gcfunc.optim.SGD", lr=0.1, momentum=0.9, gc="gc")
"""

from mmengine.optim import OPTIMIZERS

from gcfunc import optim
from gcfunc._catalog import CATALOG

for row in CATALOG.values():
    if row.around is None:  # what wraps an optimizer cannot be built from a configuration
        for name in (row.drop_in.__name__, *row.reference):
            # A name that MMEngine or another library has registered stays theirs.
            if name not in OPTIMIZERS:
                OPTIMIZERS.register_module(name, module=getattr(optim, name))
