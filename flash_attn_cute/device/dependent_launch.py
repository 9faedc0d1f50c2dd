"""Programmatic dependent launch: a kernel's CTAs start while those of the kernel before it in the stream finish.

A forward, and the merge behind it, are launched so. What a CTA sets up takes place before `wait_for_prerequisites`;
what it reads and writes in memory, behind it: then every launch before this one has ended, and its writes are seen.
Some thread of a launch has to wait, or whoever follows takes the end of this launch for the end of the ones before it.
Behind a kernel that knows nothing of this, or in a launch without predecessor, it is an ordinary launch.

See csrc_notes/scheduling.md, and the CUDA programming guide on programmatic dependent launch and synchronization.
"""

import cutlass.cute as cute


def wait_for_prerequisites():
    """Until the launches before this one have ended. Only hints may touch memory before: prefetches into L2."""
    cute.arch.griddepcontrol_wait()


def let_dependents_start():
    """CTAs of the launch behind this one may start, once all CTAs of this one have said so or left.

    A thread says it for its CTA, and as often as it likes. To be said behind `wait_for_prerequisites` where those CTAs
    read before they wait, as the merge reads a plan and lengths.
    """
    cute.arch.griddepcontrol_launch_dependents()
