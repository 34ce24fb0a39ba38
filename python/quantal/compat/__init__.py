"""Makes ``optimum.quanto`` resolve to Quantal, in this process.

    import quantal.compat            # before what imports optimum.quanto
    from optimum.quanto import freeze, qint4, quantize

Nothing is installed: finders on ``sys.meta_path`` answer for the package ``optimum.quanto`` and for
the metadata of the distribution ``optimum-quanto``, also where the real one is installed. So
transformers and diffusers find a version that they accept, and their QuantoConfig, and quantized
caches of backend "quanto", run on Quantal.

Programs that cannot be changed:

    QUANTAL_COMPAT=1                 # then ``import quantal`` does the same
    python -m quantal.compat program.py arguments…
    python -m quantal.compat -m module arguments…
"""

from ._finder import VERSION, install

__all__ = ["VERSION", "install"]

install()
