"""The optimizer that users see: groups, options, counting steps, checkpoints. Arithmetic is the backends' affair."""

from __future__ import annotations

import functools
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from copy import copy, deepcopy
from threading import RLock
from typing import Any, TypeVar, cast, overload

import torch
from torch import Tensor, nn
from torch._C._autograd import _profiler_enabled
from torch.optim.optimizer import ParamsT, _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from . import _interrupts, _validate, checkpoint, dense, mapped_table, replay, update
from ._memory import is_out_of_memory
from ._validate import GroupOptions, Place
from .dense import DenseParameter, DenseUpdate
from .gradient import check_gradient, check_values
from .moment_directory import Kept, MomentDirectory, Write
from .moments import LARGEST_CLOCK, ROWS_AT_ONCE, Moments, StateLayout, moment_dtype
from .reading import Hooks
from .update import Replaying, RowUpdate, SteadyStep, step_scalars

_Method = TypeVar("_Method", bound=Callable[..., Any])


def _observed_on_demand(step: Callable[..., Any]) -> Callable[..., Any]:
    """Run hooks, and leave a mark in profiles, where there is a hook or a profiler.

    PyTorch wraps each optimizer's step for both, which takes 12 of a small step's 25 us. ``hooked`` tells it that this
    one sees to them itself; the step of a subclass that has its own is wrapped by PyTorch.
    """
    observed = torch.optim.Optimizer.profile_hook_step(step)

    # Compiled code that calls step() must not trace into it, nor into what it calls: half of it is native.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @functools.wraps(step)
    def wrapper(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        is_observed = (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or _profiler_enabled()
        )
        # All that PyTorch wraps has the code of `observed`.
        sees_to_it = is_observed and getattr(type(self).step, "__code__", None) is not observed.__code__
        return (observed if sees_to_it else step)(self, *args, **kwargs)

    wrapper.hooked = True
    return wrapper  # type: ignore[no-any-return]


def _outside_inference_mode(method: _Method) -> _Method:
    """Leave inference mode for what makes state: what is made in it cannot be updated outside of it."""

    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return method(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return cast("_Method", wrapper)


def _in_turn(method: _Method) -> _Method:
    """Have threads that call methods of one optimizer wait for each other, and for whoever catches up on rows."""

    @functools.wraps(method)
    def wrapper(self: SparseAdam, *args: Any, **kwargs: Any) -> Any:
        with self._turn, replay.TURNS:
            return method(self, *args, **kwargs)

    return cast("_Method", wrapper)


class SparseAdam(torch.optim.Optimizer):
    r"""Adam for embedding tables that updates only the rows named by a sparse gradient.

    Takes the place of :class:`torch.optim.SparseAdam`: same arguments in the same order. What differs is where the
    moments are kept (for rows that were ever touched, not for the whole table), which code updates them, and where
    ``eps`` stands. For each distinct row :math:`i` of the gradient :math:`g`, repeated rows having been summed, at the
    table's step :math:`t`:

    .. math::
        m_i \leftarrow \beta_1 m_i + (1-\beta_1) g_i, \qquad
        v_i \leftarrow \beta_2 v_i + (1-\beta_2) g_i^2 \\
        \theta_i \leftarrow \theta_i
            - \mathrm{lr}\,\frac{m_i / (1-\beta_1^t)}{\sqrt{v_i / (1-\beta_2^t)}+\epsilon}

    where :math:`m` is ``exp_avg``, :math:`v` is ``exp_avg_sq`` and :math:`\theta` the table. Rows that are not named
    keep their weights and their moments, bit for bit. :math:`t` counts the steps in which the table had a gradient,
    one without lookups included.

    Args:
        params: tables to optimize, named tables, or dicts that define parameter groups. Strided, real floating point
            (float32, float64, bfloat16, float16) tensors of any shape. Groups may set every option for themselves
            but ``generator``, ``moment_dir``, ``backend`` and ``strict``.
        lr: learning rate, a number or a one-element tensor, read at each step; in (0, inf). A group or a scheduler
            may set it to 0: rows then keep their place while moments and step go on.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the root of the corrected second moment, in (0, inf).
        maximize: climb instead of descend.
        weight_decay: decoupled weight decay (Loshchilov and Hutter), in [0, inf): a row's weights are multiplied by
            :math:`1 - \mathrm{lr}\cdot\mathrm{weight\_decay}` before they move.
        weight_decay_mode: ``"touched"`` decays a row when it is touched, once. ``"exact"`` decays it for every step of
            the table, as :class:`torch.optim.AdamW` does: a touched row pays for the steps it missed, each with the
            ``lr`` of that step, and :meth:`flush` makes all rows pay. It needs ``lr * weight_decay < 1``, and 8 bytes
            a touched row.
        amsgrad: take the root of the largest second moment so far (Reddi, Kale and Kumar, Algorithm 2).
        bias_correction: ``"table"`` corrects with the table's step :math:`t`; ``"row"`` with the count of the row's
            own touches, so that a row first touched late starts as Adam starts. 4 bytes a touched row.
        second_moment: ``"element"``, or ``"row"``: one second moment a row, of the mean of :math:`g_i^2` over it, which
            halves the moments (FBGEMM calls it partial row-wise Adam).
        moment_dtype: ``torch.bfloat16`` or ``torch.uint8`` store the moments in 16 or 8 bits by stochastic rounding;
            None in the dtype they are computed in. The 8 bits are small floats relative to a scale for each 128
            elements of a row; ``docs/design.md`` describes them. Not with ``amsgrad``.
        moment_device: ``"cpu"`` keeps the moments in the host's memory, for tables on a device that has no room for
            them: touched rows come to the host to be updated. None keeps them beside their table. ``docs/gpu.md``
            counts what travels.
        stochastic_rounding: round the weights of bfloat16 and float16 tables up or down at random, so that changes too
            small for the dtype add up. Not for others.
        generator: draws the seed of all stochastic rounding, when the optimizer is built; None takes PyTorch's default
            one. The seed is saved in state dicts, and the same seed gives the same bits.
        dense_gradients: what to do about a parameter whose gradient is dense: raise an ``"error"`` before anything is
            written, or ``"adam"``: have PyTorch's own code update it as :class:`torch.optim.AdamW` does, fused where
            it can be, whatever ``backend`` says. It takes the group's ``lr``, ``betas``, ``eps``, ``maximize``,
            ``weight_decay`` (both modes mean the same to it) and ``amsgrad``; options that only rows can have
            (``bias_correction``, ``second_moment``, ``moment_dtype``, ``moment_device``, ``stochastic_rounding``,
            ``nonfinite="skip"``) and ``torch_eps`` are refused when such a gradient comes. One parameter may have
            gradients of both kinds by turns, as tied weights do: step and moments carry on. A step that follows one of
            the other kind converts them, in time that grows with the table.
        nonfinite: what to do about rows whose gradient, repeated rows summed, has an infinity or a NaN:
            ``"propagate"`` it as PyTorch does, raise an ``"error"`` before anything is written, or ``"skip"`` such
            rows, which stay as they were and are counted in ``state[table]["num_skipped"]``.
        missed_steps: what to do about the steps in which a row was not looked up: ``"skip"`` them, or ``"replay"`` them
            when the row is next read, so that tables go dense Adam's way: in a missed step the gradient is zero, so
            momentum moves the row on, both moments decay, and ``weight_decay`` is that of
            :class:`torch.optim.AdamW` whatever ``weight_decay_mode`` says. Weights take all of it when they are read,
            and the steps on their own gradients too. Needs :meth:`attach` (or :meth:`catch_up`) and, before weights
            are read or written directly, :meth:`flush`; 8 bytes a touched row and the numbers of each step. Not with
            ``amsgrad``, ``moment_dtype``, ``bias_correction="row"``, ``second_moment="row"`` or ``backend="triton"``,
            nor with ``moment_device="cpu"`` for tables that are elsewhere, and only with betas of which the first is
            so far below the root of the second that a row moves for 65,536 steps at most.
        moment_dir: a directory to keep the moments of tables in, in files, for moments larger than memory and for runs
            that go on after they were killed: :meth:`checkpoint` commits tables and moments together. With a new or
            empty directory the optimizer starts anew and commits what it is given; with one that has a commit it goes
            on from there: tables of :func:`memory_mapped` are as of then already, parameters in memory and all states
            are set to what they were, and seeds are taken over. Options that shape the state must be what they were;
            ``lr`` and the others are those given now. None keeps moments in memory. See
            ``docs/larger_than_memory.md``.
        torch_eps: add ``eps`` before bias correction, as :class:`torch.optim.SparseAdam` does: the effective ``eps`` is
            then ``eps / sqrt(1 - beta2**t)``. For runs that were begun with it.
        backend: ``"native"`` (C++, CPU), ``"triton"`` (CUDA and ROCm devices) or ``"reference"`` (PyTorch operations,
            any device); ``None`` takes, for each table, the fastest one present that can update it. A named backend is
            used or refused, never replaced.
        strict: look whether all row numbers are inside their tables before anything is written, also where the host
            has to wait for a device to know. Otherwise ``"triton"`` has a CUDA device assert it: a row outside its
            table then is a device-side error, after which the device cannot be used, and not an ``IndexError``.

    Raises:
        ValueError: a number outside its range, options that exclude each other, an unknown ``backend``, or a sparse,
            complex or integer table; a ``moment_dir`` that is something else's, or whose commit was made with other
            parameters or options; or a memory-mapped table of which only a part is given, or that goes with a
            ``moment_dir`` that was not given.
        TypeError: an argument of the wrong type.
        ImportError: ``backend`` names one that this installation lacks; the message gives the reason.
        FileNotFoundError: a file of ``moment_dir`` is gone, or the directory that it is to be in.
        RuntimeError: ``moment_dir`` is in use by another process, or by another optimizer of this one.
        OSError: the system refuses a file; the message has its reason.

    State:
        ``state[table]`` maps ``step`` (int), ``rows`` ``[num_slots]`` int64, and ``exp_avg`` and ``exp_avg_sq``
        ``[num_slots, *row_shape]`` in the table's dtype (float32 for half-precision tables), or in ``moment_dtype``;
        with ``second_moment="row"`` ``exp_avg_sq`` is ``[num_slots]``. A slot belongs to the row that ``rows`` names.
        Options add ``max_exp_avg_sq``, ``row_steps`` (int32), ``paid_log_decay`` (float64) with ``log_decay``,
        ``exp_avg_scale`` and ``exp_avg_sq_scale`` (float32), ``moment_steps`` and ``weight_steps`` (int32), and
        ``num_skipped``; ``sparseadam.moments.Moments`` describes them.

        After a dense gradient it is the dict that :class:`torch.optim.AdamW` keeps: ``step`` (float32, without
        dimensions), ``exp_avg``, ``exp_avg_sq`` and, with ``amsgrad``, ``max_exp_avg_sq``, each of the parameter's
        shape and dtype, half-precision ones included.

    Example:
        >>> table = torch.nn.Embedding(1_000_000, 64, sparse=True)
        >>> opt = SparseAdam(table.parameters(), lr=1e-2)
        >>> table(torch.tensor([3, 7, 3])).sum().backward()
        >>> opt.step()
        >>> opt.state[table.weight]["exp_avg"].shape
        torch.Size([2, 64])

    Note:
        :class:`torch.optim.SparseAdam` multiplies the effective ``eps`` by :math:`1/\sqrt{1-\beta_2^t}`, 31.6 times at
        the first step with the default betas. Where gradients are as small as ``eps`` results differ; pass
        ``torch_eps=True`` for its placement.

    References:
        Kingma and Ba, *Adam: A Method for Stochastic Optimization*, 2015, Algorithm 1,
        https://arxiv.org/abs/1412.6980

        Loshchilov and Hutter, *Decoupled Weight Decay Regularization*, 2019, Algorithm 2,
        https://arxiv.org/abs/1711.05101

        Reddi, Kale and Kumar, *On the Convergence of Adam and Beyond*, 2018, Algorithm 2,
        https://openreview.net/forum?id=ryQu7f-RZ

        Dettmers, Lewis, Shleifer and Zettlemoyer, *8-bit Optimizers via Block-wise Quantization*, 2022, section 2
        (scales by block), https://arxiv.org/abs/2110.02861

        Gupta, Agrawal, Gopalakrishnan and Narayanan, *Deep Learning with Limited Numerical Precision*, 2015, section 3
        (stochastic rounding), https://arxiv.org/abs/1502.02551
    """

    # What the last general step listed for steady ones. Of the class, so that a copy or a pickle starts without.
    _steady_step: SteadyStep | None = None
    # The options that it was last asked about, what of them was built into it, and the dense parameters among those
    # listed.
    _steady_options: Sequence[GroupOptions] = ()
    _steady_kinds: list[tuple[StateLayout, str | None, bool, bool]] | None = None
    _steady_dense: Sequence[DenseParameter] = ()
    _generator: torch.Generator | None = None
    # Nor do a copy or a pickle keep their moments in the files of this one.
    _directory: MomentDirectory | None = None
    _seed: int | None = None

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        maximize: bool = False,
        *,
        weight_decay: float = 0.0,
        weight_decay_mode: str = "touched",
        amsgrad: bool = False,
        bias_correction: str = "table",
        second_moment: str = "element",
        moment_dtype: torch.dtype | None = None,
        moment_device: str | None = None,
        stochastic_rounding: bool = False,
        generator: torch.Generator | None = None,
        dense_gradients: str = "error",
        nonfinite: str = "propagate",
        missed_steps: str = "skip",
        moment_dir: str | os.PathLike[str] | None = None,
        torch_eps: bool = False,
        backend: str | None = None,
        strict: bool = False,
    ) -> None:
        """Check all arguments; see the class for what they mean."""
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "maximize": maximize,
            "weight_decay": weight_decay,
            "weight_decay_mode": weight_decay_mode,
            "amsgrad": amsgrad,
            "bias_correction": bias_correction,
            "second_moment": second_moment,
            "moment_dtype": moment_dtype,
            "moment_device": moment_device,
            "stochastic_rounding": stochastic_rounding,
            "dense_gradients": dense_gradients,
            "nonfinite": nonfinite,
            "missed_steps": missed_steps,
            "torch_eps": torch_eps,
        }
        _validate.check_defaults(defaults)
        _validate.check_generator(generator)
        _validate.check_moment_dir(moment_dir)
        update.check_backend(backend)
        self._backend = backend
        self._strict = _validate.check_flag(strict, "strict")
        self._generator = generator
        # Groups are added one by one below; faults of all of them are then reported together.
        self._is_built = False
        self._turn = RLock()
        super().__init__(params, defaults)
        _validate.check_parameters(self.param_groups)
        self._check_mapped(0, has_directory=moment_dir is not None)
        if moment_dir is not None:
            self._open_directory(moment_dir)
        self._is_built = True

    @_interrupts.held()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as :meth:`torch.optim.Optimizer.add_param_group` does.

        With a ``moment_dir``, all there is is committed with it.

        Args:
            param_group: ``params`` and, where they differ from the defaults, the group's options.

        Raises:
            ValueError: an option outside its range or not supported; a table that is sparse, complex or integer; or a
                memory-mapped table of which only a part is given, or that goes with a ``moment_dir`` of another.
            TypeError: an option of the wrong type.
            RuntimeError: there is a ``moment_dir``, and :meth:`checkpoint` would raise one. No group is added.
            OSError: the disk could not take the commit.
        """
        group_index = len(self.param_groups)
        try:
            super().add_param_group(param_group)
            self._draw_seed(self.param_groups[-1])
            _validate.check_group(self.param_groups[-1], group_index)
            if self._is_built:
                _validate.check_parameters(self.param_groups[-1:], group_index)
                self._check_mapped(group_index, has_directory=self._directory is not None)
                if self._directory is not None:
                    kept = self._all_kept()
                    self._directory.add([each for each in kept if each.place.group_index == group_index], kept)
        except BaseException:  # what keeps it from being committed, too
            del self.param_groups[group_index:]
            raise

    def _check_mapped(self, first_group: int, *, has_directory: bool) -> None:
        """Refuse parts of memory-mapped tables, and tables whose moments are in a directory that is not given."""
        for place, table in self._places():
            mapped = mapped_table.find_whole(table, place) if place.group_index >= first_group else None
            if mapped is not None and not has_directory and mapped.pairing is not None:
                raise _validate.unpaired_optimizer_error(mapped.path, mapped.pairing["path"])

    def _open_directory(self, path: str | os.PathLike[str]) -> None:
        """Go on from the last commit of a directory, or begin one."""
        options = [_validate.check_group(group, index) for index, group in enumerate(self.param_groups)]
        kept = [Kept(place, table, None) for place, table in self._places()]
        directory = MomentDirectory(path, kept, [options[each.place.group_index].layout for each in kept])
        for number, state in directory.states.items():
            table, place = kept[number].parameter, kept[number].place
            if not isinstance(state, Moments):
                state = dense.read_state(state, table, place, amsgrad=options[place.group_index].layout.amsgrad)
            self.state[table] = state
        directory.states.clear()
        for group, seed in zip(self.param_groups, directory.seeds, strict=False):
            if seed is not None and _validate.rounds_stochastically(group):
                group[_validate.SEED] = seed
        self._directory = directory

    def _places(self) -> list[tuple[Place, Tensor]]:
        """Return all parameters with their places; one that is listed twice has the first."""
        places: dict[Tensor, Place] = {}
        for group_index, group in enumerate(self.param_groups):
            for position, table in enumerate(group["params"]):
                places.setdefault(table, Place(group, group_index, position))
        return [(place, table) for table, place in places.items()]

    def _all_kept(self) -> list[Kept]:
        """Return all parameters with what is kept for them, moments in the directory's files."""
        all_kept = []
        for place, table in self._places():
            options = _validate.check_group(place.group, place.group_index)
            all_kept.append(Kept(place, table, self._kept(table, place, options)))
        return all_kept

    @_in_turn
    @_outside_inference_mode
    def checkpoint(self) -> None:
        """Commit tables, moments and all other state together, so that a run can go on from here.

        For an optimizer with a ``moment_dir``. A process that is killed at any moment after, in the middle of a step or
        of the next checkpoint too, leaves files from which :func:`memory_mapped` and a new optimizer, built with the
        same arguments, come back to what is now. Memory-mapped tables and moments are written to the disk, of which
        only pages that changed; parameters in memory, and the states of dense gradients, are saved whole.

        Raises:
            RuntimeError: the optimizer has no ``moment_dir``, or a table that changed under its moments.
            OSError: the disk could not take it. The run can go on, and the commit before stands, unless the message
                says that the new one does.
        """
        if self._directory is None:
            raise _validate.no_directory_error()
        self._directory.commit(self._all_kept())

    def _draw_seed(self, group: dict[str, Any]) -> None:
        """Give a group that rounds at random a seed, drawn once for all groups, which their places tell apart."""
        if _validate.SEED not in group and _validate.rounds_stochastically(group):
            group[_validate.SEED] = self._drawn_seed()

    def _drawn_seed(self) -> int:
        if self._seed is None:
            device = "cpu" if self._generator is None else self._generator.device
            self._seed = int(torch.randint(_validate.SEED_END, (), generator=self._generator, device=device))
        return self._seed

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @_observed_on_demand
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform a single optimization step on every parameter that has a gradient.

        All gradients and options are checked before the first row is changed: a step that raises has changed nothing.
        (Of row numbers see ``strict``.)

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: a gradient of rows that are behind (``missed_steps="replay"``) or that were read before they
                had their initial values (:func:`initialize_on_read`); one that is dense (or is, with
                ``dense_gradients="adam"``, in a group with an option for tables only), of a layout other than COO, or
                not of its table's shape, dtype or device; one that is not finite, with ``nonfinite="error"``; a table
                that changed under its moments, or has taken as many steps as can be counted; or one that the named
                backend cannot update.
            IndexError: a row outside its table.
            ValueError: an option of a group has been set outside its range.
            OSError: no room on the disk for tables or moments in files.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._turn:
            options = self._read_options()
            if not self._step_steadily(options):
                with replay.TURNS if any(each.layout.replays for each in options) else nullcontext():
                    self._step_generally(options)
        return loss

    def _read_options(self) -> Sequence[GroupOptions]:
        """Return every group's options, which were checked before where they are the very objects that they were."""
        if self._steady_step is not None and self._steady_step.are_options_as_before(self.param_groups):
            return self._steady_options
        return [_validate.check_group(group, index) for index, group in enumerate(self.param_groups)]

    def _options_at(self, place: Place) -> GroupOptions:
        """Return the options of a parameter's group, as ``_read_options`` does those of all."""
        steady_step = self._steady_step
        if steady_step is not None and steady_step.are_options_as_before(self.param_groups):
            return self._steady_options[place.group_index]
        return _validate.check_group(place.group, place.group_index)

    def _step_steadily(self, options: Sequence[GroupOptions]) -> bool:
        """Step without looking at each table in Python, if all look as after the last general step."""
        if self._steady_step is None:
            return False
        if options is not self._steady_options:
            if self._steady_kinds != _kinds(options):
                return False
            self._remember_options(self._steady_step, options)
        if not dense.are_finite_where_asked(self._steady_dense, options):
            return False
        if not self._steady_dense and not self._steady_step.replaying:
            return self._run_steadily(self._steady_step, options)
        # The step goes on behind its native part: signals wait, and so do threads that read rows.
        with replay.TURNS, _interrupts.held():
            return self._run_steadily(self._steady_step, options)

    def _run_steadily(self, steady_step: SteadyStep, options: Sequence[GroupOptions]) -> bool:
        parameters = [group["params"] for group in self.param_groups]
        scalars_at = [functools.partial(step_scalars, group_options) for group_options in options]
        grads = steady_step.run(self.state, parameters, scalars_at)
        if grads is None:
            return False
        if grads:
            dense.update_parameters(zip(self._steady_dense, grads, strict=True), options)
        self._flush_where_due(steady_step.replaying, options)
        return True

    @_outside_inference_mode
    def _step_generally(self, options: Sequence[GroupOptions]) -> None:
        self._adopt_states()
        with _interrupts.held():  # files, too, are seen to for this step, and not for what a handler may save meanwhile
            updates, dense_updates = self._gather_updates(options)
            self._before_steps(updates, dense_updates)
            if updates:
                self._update_tables(updates, options)
            self._update_dense(dense_updates, options)
        self._list_for_steady_steps(options)

    def _update_tables(self, updates: list[RowUpdate], options: Sequence[GroupOptions]) -> None:
        try:
            update.update_rows(updates, self._backend, strict=self._strict)
        finally:  # what was stepped is kept, whatever came after it
            for each in updates:
                if each.is_done():
                    self.state[each.table] = each.moments
        self._flush_where_due(updates, options)

    def _flush_where_due(self, stepped: Iterable[RowUpdate | Replaying], options: Sequence[GroupOptions]) -> None:
        for each in stepped:
            if replay.is_flush_due(each.moments):
                try:
                    self._bring_up_to_date(each.table, each.moments, each.place, options[each.place.group_index])
                except (OSError, MemoryError, RuntimeError) as error:
                    # The step is taken. Where a disk or memory has no room for this much, the next one tries it again.
                    has_no_room = isinstance(error, OSError) and self._is_in_files(each.table)
                    if not has_no_room and not is_out_of_memory(error):
                        raise

    def _before_steps(self, updates: Sequence[RowUpdate], dense_updates: Sequence[DenseUpdate]) -> None:
        """See to files before the first row is written, having checked row numbers, which come first in errors too."""
        in_files = [each for each in updates if self._is_in_files(each.table)]
        for each in in_files:
            update.check_range(each)
        self._before_writing([Write(each.table, each.moments, update.touched_rows(each)) for each in in_files])
        for dense_update, _ in dense_updates:
            moments = self._moments_that_owe(dense_update.parameter)
            if moments is not None and self._is_in_files(dense_update.parameter):
                self._before_writing_all(dense_update.parameter, moments)

    def _before_writing_all(self, table: Tensor, moments: Moments) -> None:
        """Do as ``_before_writing`` does for all rows that bringing a table up to date can write, some at a time."""
        history = moments.history
        if history is not None and history.log_decay == 0.0:
            for rows in torch.split(moments.rows, ROWS_AT_ONCE):
                self._before_writing([Write(table, moments, rows)])
            return
        for begin in range(0, moments.num_rows, ROWS_AT_ONCE):
            rows = torch.arange(begin, min(begin + ROWS_AT_ONCE, moments.num_rows), device="cpu")
            self._before_writing([Write(table, moments, rows)])

    def _before_writing(self, writes: Sequence[Write]) -> None:
        """See to it that rows, and moments of theirs, can be written to files and taken back.

        To be called before anything is written that tables or their moments have in files, with all that will be; for
        others it does nothing.

        Raises:
            RuntimeError: rows were read before they had their initial values.
            OSError: the disk has no room. Nothing of what is kept has been changed.
        """
        if self._directory is not None:
            self._directory.before_writing(writes)
            return
        for write in writes:
            mapped = mapped_table.find(write.table)
            if mapped is not None:
                mapped.before_writing(write.rows)

    def _update_dense(self, updates: list[DenseUpdate], options: Sequence[GroupOptions]) -> None:
        for updated, _ in updates:
            moments = self._moments_that_owe(updated.parameter)
            if moments is not None:
                self._pay_decay(updated.parameter, moments, updated.place, options[updated.place.group_index])
        dense.update_parameters(updates, options)
        for updated, _ in updates:
            self.state[updated.parameter] = updated.state

    def _moments_that_owe(self, parameter: Tensor) -> Moments | None:
        """Return the moments of a table whose rows pay what they owe before a dense step."""
        moments = self.state.get(parameter)
        return moments if isinstance(moments, Moments) and moments.layout.owes_decay else None

    def _list_for_steady_steps(self, options: Sequence[GroupOptions]) -> None:
        if self._backend == "reference" or self._has_files():
            self._steady_step = None
            return
        self._steady_dense = dense.list_parameters(self.param_groups, self.state, options)
        listed = {parameter.parameter for parameter in self._steady_dense}
        self._steady_step = update.list_tables(self.param_groups, options, self.state, listed)
        self._steady_kinds = _kinds(options)
        if self._steady_step is not None:
            self._remember_options(self._steady_step, options)

    def _remember_options(self, steady_step: SteadyStep, options: Sequence[GroupOptions]) -> None:
        self._steady_options = options  # first: another thread that catches up may ask meanwhile
        steady_step.remember_options(self.param_groups)

    def _has_files(self) -> bool:
        """Whether steps must see to files before they write."""
        return any(self._is_in_files(table) for group in self.param_groups for table in group["params"])

    def _is_in_files(self, table: Tensor) -> bool:
        """Whether a table or its moments are in files."""
        return self._directory is not None or mapped_table.find(table) is not None

    def _gather_updates(self, options: Sequence[GroupOptions]) -> tuple[list[RowUpdate], list[DenseUpdate]]:
        """Collect the parameters that have a gradient, having checked all but row numbers; changes nothing."""
        updates, dense_updates = [], []
        seen: set[int] = set()  # a table listed twice in a group, of which torch has warned, is stepped once
        for group_index, group in enumerate(self.param_groups):
            for position, table in enumerate(group["params"]):
                grad = table.grad
                if grad is None or id(table) in seen:
                    continue
                seen.add(id(table))
                place = Place(group, group_index, position)
                mapped = mapped_table.find(table) if grad.layout is torch.strided else None
                if mapped is not None:
                    raise _validate.mapped_dense_error(place, mapped.path)
                if dense.is_dense(grad, options[group_index]):
                    dense_updates.append(self._check_dense(table, grad, place, options[group_index]))
                    continue
                check_gradient(table, grad, place)
                if options[group_index].stochastic_rounding and table.dtype not in _validate.HALF_DTYPES:
                    raise _validate.wide_table_error(place, table.dtype)
                indices, values = grad._indices(), grad._values()
                sparse_dim, num_lookups = indices.shape
                moments = self._fitting_moments(table, sparse_dim, place, options[group_index])
                check_values(values, num_lookups, moments.row_shape, place)
                if moments.history is not None and moments.step >= LARGEST_CLOCK:
                    raise _validate.clock_error(place, moments.step)
                indices, values = indices.contiguous(), values.contiguous()
                scalars = step_scalars(options[group_index], moments.step + 1)
                rounds = options[group_index].stochastic_rounding
                updates.append(RowUpdate(place, table, moments, indices, values, num_lookups, scalars, rounds))
        return updates, dense_updates

    def _check_dense(self, parameter: Tensor, grad: Tensor, place: Place, options: GroupOptions) -> DenseUpdate:
        state = self.state.get(parameter)
        if isinstance(state, Moments):
            state = self._fitting_moments(parameter, state.sparse_dim, place, options)
            if replay.has_rows_behind(state):
                raise _validate.dense_behind_error(place)
        return dense.check_update(parameter, grad, state, place, options)

    def _fitting_moments(self, table: Tensor, sparse_dim: int, place: Place, options: GroupOptions) -> Moments:
        """Return moments that fit a table: its own, regrouped, moved or read where need be, or new ones.

        They enter the state when their step is done.
        """
        moments = self._moments_of(table, place, options)
        device = options.device_of_moments(table)
        if moments is None:
            moments = Moments(table.shape, sparse_dim, moment_dtype(table.dtype), device, options.layout)
        if moments.device != device:
            moments = moments.moved(device)
        moments = self._regrouped(moments, sparse_dim, place)
        return moments if self._directory is None else self._directory.keep(moments, place)

    def _regrouped(self, moments: Moments, sparse_dim: int, place: Place) -> Moments:
        """Return moments whose rows are named by so many dimensions; refuse where rows have something in common."""
        if moments.sparse_dim == sparse_dim:
            return moments
        if moments.num_slots > 0 and not moments.layout.is_elementwise:
            raise _validate.regrouping_error(place, moments.sparse_dim, sparse_dim)
        return moments.with_sparse_dim(sparse_dim)

    def _moments_of(self, table: Tensor, place: Place, options: GroupOptions) -> Moments | None:
        """Return a table's own moments, if it has any; refuse those of another shape, dtype or layout."""
        state = self.state.get(table)
        if isinstance(state, Moments):  # whose length is not asked for: it can be on a device
            moments = state
        elif not state:
            return None
        else:  # a plain mapping put there from outside, as code that moves states between devices does
            moments = checkpoint.read_state(state, table, place, options, is_compact=False)
        if moments.layout != options.layout:
            raise _validate.layout_change_error(place, moments.layout, options.layout)
        if moments.shape != table.shape:
            raise _validate.moment_shape_error(place, moments.shape, table.shape)
        if moments.dtype is not moment_dtype(table.dtype):
            raise _validate.moment_dtype_error(place, moments.dtype, table.dtype, moment_dtype(table.dtype))
        return moments

    def _adopt_states(self) -> None:
        """Make moments of the plain mappings of theirs that code has put in their place, as to move them elsewhere."""
        for group_index, group in enumerate(self.param_groups):
            for position, table in enumerate(group["params"]):
                state = self.state.get(table)
                if isinstance(state, Mapping) and not isinstance(state, Moments) and "rows" in state:
                    options = _validate.check_group(group, group_index)
                    self.state[table] = self._kept(table, Place(group, group_index, position), options)

    def _kept(self, param: Tensor, place: Place, options: GroupOptions) -> Moments | Mapping[str, Any] | None:
        """Return what is kept for a parameter between steps: its moments, or its dense state where it takes those."""
        state = self.state.get(param)
        if dense.keeps_state(state, param, options):
            return state
        moments = self._moments_of(param, place, options)
        if moments is not None and self._directory is not None:  # which may have been put there from outside
            moments = self.state[param] = self._directory.keep(moments, place)
        return moments

    def attach(self, model: nn.Module) -> Hooks:
        """Have the rows of this optimizer's tables brought up to date whenever a model is about to read them.

        For ``missed_steps="replay"``. From then on every ``nn.Embedding`` and ``nn.EmbeddingBag`` of the model whose
        weight is a table of such a group catches up on the rows it looks up, in training and in evaluation, and so
        does every module that announces what it reads (``register_read_hook``). ``state_dict()`` and
        ``load_state_dict()`` of a module that holds such a table call :meth:`flush` first. A module of your own that
        reads a table otherwise calls :meth:`catch_up`. Copies of the model are not attached.

        Args:
            model: the module that reads the tables, or one that contains it.

        Returns:
            A handle; its ``remove()`` calls :meth:`flush` and detaches the model. It is a context manager as well.
        """
        replaying = [group for group in self.param_groups if group["missed_steps"] == "replay"]
        tables = [table for group in replaying for table in group["params"]]
        return replay.attach(model, tables, self._catch_up_if_own, self.flush)

    def catch_up(self, param: Tensor, rows: Tensor) -> None:
        """Move rows of a table by the steps that their weights have yet to take, before they are read.

        What :meth:`attach` does for modules that it knows. Rows that are up to date are left as they are. Of a table
        with ``missed_steps="skip"`` no row is ever behind.

        Args:
            param: the table, one of this optimizer's.
            rows: int64 ``[num_rows_read]``, of the table viewed as ``[num_rows, width]``, in any order and with
                repeats.

        Raises:
            ValueError: ``param`` is not this optimizer's, or an option of its group has been set outside its range.
            TypeError: ``rows`` is not an int64 tensor of one dimension.
            IndexError: a row outside the table. Nothing has been changed. Before the first gradient, which tells how
                many dimensions of the table name a row, only numbers beyond its elements are known to be outside.
            RuntimeError: the table has another shape or dtype than its moments were made for, or cannot be updated by
                the backend that was named. Nothing has been changed.
            OSError: no room on the disk for tables or moments in files. Nothing has been changed.
        """
        place = self._place_of(param)
        if not self._catch_up(place, param, rows):
            _check_row_range(rows, param, self.state.get(param), place)

    def _catch_up_if_own(self, table: Tensor, rows: Tensor) -> None:
        """Catch up on rows that a module announces; it may read tables of others as well."""
        place = self._find(table)
        if place is not None:
            self._catch_up(place, table, rows)

    @_outside_inference_mode
    def _catch_up(self, place: Place, table: Tensor, rows: Tensor) -> bool:
        """Return whether rows of the table can be behind; only then their range is checked."""
        options = self._options_at(place)
        _validate.check_rows(rows, place)
        moments = self._kept(table, place, options)
        if not isinstance(moments, Moments) or moments.history is None:
            return False
        self._bring_rows_up_to_date(table, moments, rows, place, options)
        return True

    def _bring_rows_up_to_date(
        self, table: Tensor, moments: Moments, rows: Tensor, place: Place, options: GroupOptions
    ) -> None:
        with replay.TURNS, _interrupts.held():
            if self._is_in_files(table):
                _validate.check_row_range(rows, moments.num_rows, place)
                behind = update.rows_behind(moments, torch.unique(rows))
                self._before_writing([Write(table, moments, behind)])
            replay.catch_up(table, moments, rows, place, options, self._backend)

    def flush(self) -> None:
        """Bring whole tables up to date, in groups with ``missed_steps="replay"`` or ``weight_decay_mode="exact"``.

        Until then the weights of a row are those of its last touch or, with ``"replay"``, of when it was last read.
        Call it before weights are read directly (to evaluate, to export). A checkpoint needs no flush: what is owed
        is saved with it, and :meth:`state_dict` flushes tables of ``"replay"`` by itself. It passes over every row of
        the tables, of ``"replay"`` without weight decay over every row that was ever touched.

        Raises:
            RuntimeError: a table has another shape or dtype than its moments were made for, or an option that shapes
                them has been changed since. Nothing has been changed.
            ValueError: an option of a group has been set outside its range. Nothing has been changed.
            OSError: no room on the disk for tables or moments in files. Tables before are up to date.
        """
        self._flush(lambda layout: layout.owes_decay or layout.replays)

    @_in_turn
    @_outside_inference_mode
    def _flush(self, is_meant: Callable[[StateLayout], bool]) -> None:
        options = [_validate.check_group(group, index) for index, group in enumerate(self.param_groups)]
        behind = []
        for group_index, group in enumerate(self.param_groups):
            for position, table in enumerate(group["params"]):
                place, layout = Place(group, group_index, position), options[group_index].layout
                state = self.state.get(table)
                has_changed = isinstance(state, Moments) and state.layout != layout  # which is refused
                if not has_changed and not is_meant(layout):
                    continue
                moments = self._kept(table, place, options[group_index])
                if isinstance(moments, Moments) and is_meant(layout):
                    behind.append((table, moments, place))
        for table, moments, place in behind:
            self._bring_up_to_date(table, moments, place, options[place.group_index])

    @_interrupts.held()
    def _bring_up_to_date(self, table: Tensor, moments: Moments, place: Place, options: GroupOptions) -> None:
        if self._is_in_files(table):
            self._before_writing_all(table, moments)
        if options.layout.replays:
            replay.flush(table, moments, place, options, self._backend)
        else:
            self._pay_decay(table, moments, place, options)
        self.state[table] = moments

    def _pay_decay(self, table: Tensor, moments: Moments, place: Place, options: GroupOptions) -> None:
        rounds = options.stochastic_rounding
        update.pay_decay(table, moments, place, options.seed or 0, stochastic_rounding=rounds)

    @_in_turn
    @_outside_inference_mode
    @_interrupts.held()
    def forget(self, param: Tensor, rows: Tensor) -> None:
        """Take from rows of a table all that is kept for them, as for rows given to a new owner.

        They are then as if never touched: no moments, no count of touches. Their weights are left alone, and all other
        rows and their state are, bit for bit. With ``weight_decay_mode="exact"`` the rows owe nothing afterwards; with
        ``missed_steps="replay"`` they are brought up to date first. Slots of other rows move into the places that are
        free then: copy a :meth:`state_dict` that was taken before and is still to be used (``copy.deepcopy``), as its
        tensors are views.

        Args:
            param: the table, one of this optimizer's.
            rows: int64 ``[num_forgotten]``, of the table viewed as ``[num_rows, width]``; repeats count once.

        Raises:
            ValueError: ``param`` is not this optimizer's.
            TypeError: ``rows`` is not an int64 tensor of one dimension.
            IndexError: a row outside the table; before its first gradient, one beyond its elements.
            OSError: no room on the disk for tables or moments in files. Nothing has been changed.
        """
        place = self._place_of(param)
        options = _validate.check_group(place.group, place.group_index)
        kept = self._kept(param, place, options)
        _validate.check_rows(rows, place)
        _check_row_range(rows, param, kept, place)
        if isinstance(kept, Moments):
            rows = torch.unique(rows.to(kept.device))
            if kept.history is not None:
                self._bring_rows_up_to_date(param, kept, rows, place, options)
            if self._directory is not None:
                self._directory.before_forgetting(kept, rows)
            kept.forget(rows)
            self.state[param] = kept
        elif kept is not None:
            dense.forget(kept, rows)

    @_in_turn
    @_outside_inference_mode
    @_interrupts.held()
    def resize(self, param: Tensor, num_rows: int) -> None:
        """Give a table more rows, or fewer: ``param`` stays the same object, with other memory and another shape.

        Rows that stay keep their weights and their state, bit for bit. New rows are zero, for the caller to fill, and
        have no state. A module's own record of its size (``embedding.num_embeddings``) is the caller's to change.
        With ``weight_decay_mode="exact"`` all rows pay what they owe first, and with ``missed_steps="replay"`` all are
        brought up to date.

        Args:
            param: the table, one of this optimizer's.
            num_rows: its new leading size, at least 0.

        Raises:
            ValueError: ``param`` is not this optimizer's, or has no dimension to grow.
            TypeError: ``num_rows`` is not an int.
            RuntimeError: ``param`` has a gradient, which would not fit; or it or its moments are in files; or its
                gradients had no sparse dimension, under an option that does not let the table be taken apart.
        """
        place = self._place_of(param)
        if self._is_in_files(param):
            raise _validate.resize_files_error(place)
        _validate.check_resize(param, num_rows, place)
        options = _validate.check_group(place.group, place.group_index)
        kept = self._kept(param, place, options)
        if isinstance(kept, Moments) and kept.sparse_dim == 0:  # its one row is the whole table, which is to change
            kept = self._regrouped(kept, 1, place)
        if isinstance(kept, Moments) and (kept.layout.owes_decay or kept.layout.replays):
            self._bring_up_to_date(param, kept, place, options)
        resized = param.detach().new_zeros((num_rows, *param.shape[1:]))
        num_kept = min(num_rows, len(param))
        resized[:num_kept] = param.detach()[:num_kept]
        state: Moments | Mapping[str, Any] | None = None
        if isinstance(kept, Moments):
            state = kept.resized(resized.shape)
        elif kept is not None:
            state = dense.resized(kept, num_rows)
        # While a graph of before lives, as that of a loss that is still held, autograd checks new gradients against the
        # shape that it noted then. Memory of another dtype makes it take note anew; another shape alone does not.
        of_another_dtype = resized.new_empty(0, dtype=torch.float32 if param.dtype is torch.float64 else torch.float64)
        # From here on no memory is needed.
        if state is not None:
            self.state[param] = state
        param.data = of_another_dtype
        param.data = resized

    def _place_of(self, param: Tensor) -> Place:
        place = self._find(param)
        if place is None:
            raise _validate.unknown_parameter_error(param)
        return place

    def _find(self, param: Tensor) -> Place | None:
        for group_index, group in enumerate(self.param_groups):
            for position, table in enumerate(group["params"]):
                if table is param:
                    return Place(group, group_index, position)
        return None

    @_in_turn
    def moment_bytes(self) -> int:
        """Return how many bytes the state takes: moments and row numbers of touched rows, and the index of all rows.

        The index is 4 bytes a row of the table; on the CPU its untouched pages take no memory, so what is resident
        may be less. Of parameters with dense gradients it is their whole state.
        """
        self._adopt_states()
        tables = sum(state.num_bytes for state in self.state.values() if isinstance(state, Moments))
        return tables + sum(dense.state_bytes(state) for state in self.state.values() if dense.is_dense_state(state))

    @_in_turn
    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state as plain values, as :meth:`torch.optim.Optimizer.state_dict` does.

        Tensors are live views of the moments and change with later steps, as in PyTorch; a saved file holds touched
        rows only. Load it with ``torch.load(..., weights_only=True)``. Tables with ``missed_steps="replay"`` are
        brought up to date first, so that the file need not hold what they have missed: save the model beside it.
        """
        self._flush(lambda layout: layout.replays)
        return self._pack(checkpoint.write_state, {checkpoint.FORMAT_KEY: checkpoint.FORMAT})

    @_in_turn
    def to_torch_state_dict(self) -> dict[str, Any]:
        """Return a state dict that :class:`torch.optim.SparseAdam` loads, with dense moments of every table.

        Pass ``torch_eps=True`` to the optimizer, before or after, for the same trajectory in both.

        Groups of parameters with dense gradients, or with ``missed_steps="replay"``, are for
        :class:`torch.optim.AdamW`, with ``weight_decay`` and ``amsgrad``; its Adam loads them too. Tables of the
        latter, and those that owe decay (``weight_decay_mode="exact"``), are brought up to date first. Of a model with
        both kinds, in groups apart, give each optimizer its own::

            saved = optimizer.to_torch_state_dict()
            for each, group in zip([torch_sparse_adam, torch_adamw], saved["param_groups"]):
                state = {number: saved["state"][number] for number in group["params"]}
                each.load_state_dict({"state": state, "param_groups": [group]})

        Raises:
            ValueError: an option that PyTorch's SparseAdam does not have, in a group with tables: ``weight_decay``,
                ``amsgrad``, ``bias_correction="row"`` or ``second_moment="row"``.
        """
        self._adopt_states()
        is_adams = []
        for group_index, group in enumerate(self.param_groups):
            states = [self.state.get(table) for table in group["params"]]
            options = _validate.check_group(group, group_index)
            is_adams.append(options.layout.replays or any(dense.is_dense_state(state) for state in states))
            has_tables = any(isinstance(state, Moments) for state in states)
            if not is_adams[-1] or (has_tables and not options.layout.replays):
                checkpoint.check_torch_group(options, group_index)
        self._flush(lambda layout: layout.replays or layout.owes_decay)
        packed = self._pack(checkpoint.write_torch_state, {})
        packed["param_groups"] = [
            checkpoint.torch_group(group, for_adam=is_adam)
            for group, is_adam in zip(packed["param_groups"], is_adams, strict=True)
        ]
        return packed

    def _pack(self, write: Callable[[Moments], dict[str, Any]], header: dict[str, Any]) -> dict[str, Any]:
        """Run PyTorch's ``state_dict`` with each table's moments written out before its post-hooks see them."""

        def write_out(_: torch.optim.Optimizer, packed: dict[str, Any]) -> None:
            packed["state"] = {
                key: write(state) if isinstance(state, Moments) else state for key, state in packed["state"].items()
            }
            packed.update(header)

        with _interrupts.held():  # a hook that stayed would be run by the next one, too
            handle = self.register_state_dict_post_hook(write_out, prepend=True)
            try:
                return super().state_dict()
            finally:
                handle.remove()

    @_in_turn
    @_outside_inference_mode
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class, of :class:`torch.optim.SparseAdam`, Adam (without weight decay) or AdamW.

        Options that a checkpoint of PyTorch's lacks keep their present values. It does not say which parameters are
        tables: with ``dense_gradients="adam"`` its moments stay dense until a sparse gradient comes. Nor does it say
        how ``weight_decay`` reaches rows without a gradient: as in AdamW with ``weight_decay_mode="exact"`` or
        ``missed_steps="replay"`` only, which are this optimizer's own options. PyTorch's moments are refused where
        they are kept otherwise: with ``moment_dtype``, ``second_moment="row"`` or ``bias_correction="row"``.

        Args:
            state_dict: what :meth:`state_dict` returned. It is copied.

        Raises:
            ValueError: the checkpoint does not fit: other groups, rows of another shape, a moment of another dtype, a
                missing key, a row outside its table or there twice, an option that is not supported. The optimizer is
                as it was. (How many rows a table had is not saved, so a table may have grown meanwhile.)
            TypeError: an option of the wrong type.
        """
        state_dict = copy(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        checkpoint.check_format(state_dict)
        groups = self._read_groups(state_dict["param_groups"])
        state = self._read_states(
            state_dict["state"], state_dict["param_groups"], groups, is_compact=checkpoint.FORMAT_KEY in state_dict
        )
        self.__setstate__({"state": state, "param_groups": groups})
        self._steady_step = None  # which keeps the moments of before
        # Of groups that are added later, too.
        self._seed = next((group[_validate.SEED] for group in groups if _validate.SEED in group), self._seed)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _read_groups(self, saved_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the groups as a checkpoint sets them, checked; the parameters are this optimizer's."""
        if len(saved_groups) != len(self.param_groups):
            raise _validate.num_groups_error(len(saved_groups), len(self.param_groups))
        groups = []
        for group_index, (group, saved) in enumerate(zip(self.param_groups, saved_groups, strict=True)):
            num_saved = len(saved.get("params", ()))
            if num_saved != len(group["params"]):
                raise _validate.group_size_error(group_index, num_saved, len(group["params"]))
            groups.append(checkpoint.read_group(saved, group, self.defaults))
            self._draw_seed(groups[-1])
            _validate.check_group(groups[-1], group_index)
        _validate.check_parameters(groups)
        return groups

    def _read_states(
        self,
        states: Mapping[Any, Any],
        saved_groups: list[dict[str, Any]],
        groups: list[dict[str, Any]],
        *,
        is_compact: bool,
    ) -> defaultdict[Any, Any]:
        """Return the states as a checkpoint sets them, checked; those of no parameter are taken as they are."""
        tables: dict[Any, tuple[Tensor, Place, GroupOptions]] = {}
        for group_index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
            options = _validate.check_group(group, group_index)
            for index, (key, table) in enumerate(zip(saved["params"], group["params"], strict=True)):
                tables[key] = table, Place(group, group_index, index), options
        read: defaultdict[Any, Any] = defaultdict(dict)
        for key, state in checkpoint.by_number(states, tables).items():
            if key not in tables:
                read[key] = deepcopy(state)
            elif not isinstance(state, Mapping) or len(state) > 0:
                table, place, options = tables[key]
                if dense.keeps_state(state, table, options):
                    read[table] = dense.read_state(state, table, place, amsgrad=options.layout.amsgrad)
                else:
                    moments = checkpoint.read_state(state, table, place, options, is_compact=is_compact)
                    read[table] = moments if self._directory is None else self._directory.keep(moments, place)
        return read

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what was copied or loaded; a copy's steps take turns of their own."""
        super().__setstate__(state)
        self.__dict__.setdefault("_turn", RLock())

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle the backend's name along with what PyTorch keeps, and what a generator would give."""
        seed = self._seed if self._generator is None else self._drawn_seed()
        own = {"_backend": self._backend, "_strict": self._strict, "_is_built": self._is_built, "_seed": seed}
        return super().__getstate__() | own


def _check_row_range(rows: Tensor, table: Tensor, kept: Moments | Mapping[str, Any] | None, place: Place) -> None:
    """Refuse rows that a table cannot have.

    Which dimensions name a row, gradients tell; before the first one, any number of an element may be a row's.
    """
    num_leading = len(table) if table.dim() > 0 else 1
    if isinstance(kept, Moments):
        _validate.check_row_range(rows, kept.num_rows, place)
    elif kept:
        _validate.check_row_range(rows, num_leading, place)
    else:
        _validate.check_row_range(rows, max(num_leading, table.numel()), place, is_known=False)


def _kinds(options: Sequence[GroupOptions]) -> list[tuple[StateLayout, str | None, bool, bool]]:
    """Return what of the groups' options a steady step has been built with."""
    return [(each.layout, each.moment_device, each.stochastic_rounding, dense.takes_dense(each)) for each in options]
