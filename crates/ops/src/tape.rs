//! [`Tape`]: what the trainer records instead of candle's graph.
//!
//! Candle adds every gradient to a tensor of zeros made for it, on one thread, and keeps all operands of all ops until the
//! whole graph is dropped. Here a first contribution is moved, a later one is added in place (a matrix product adds as it
//! goes), only what a backward reads is kept, and each op is freed as backward passes it.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};

use candle_core::shape::ShapeWithOneHole;
use candle_core::{CpuStorage, Result, Shape, Tensor, TensorId, Var, bail};

use crate::Weight;
use crate::autograd::{backward_from, grad_enabled};
use crate::candle_tape;
use crate::gradients::{Backward, Gradients, Saved, Saves, Slot, WeightSlot};
use crate::operand::tensor_of;
use crate::trace::{self, Cost};

thread_local! {
    static CURRENT: RefCell<Option<Tape>> = const { RefCell::new(None) };
}

/// The ops that ran on this thread within [`record`], in order, ready to run backward once.
///
/// Only ops of this crate are recorded, and nothing is cut in silence: an operand must come from a recorded op, from an op
/// over constants alone, or from [`constant`]. A tensor that a plain candle op made is an error as soon as an op of this
/// crate meets it, or at the latest when backward finds a result that nothing used. Use [`reshape`], [`narrow`], or
/// [`composed_of`] around candle ops. Candle's `detach` does not stop a gradient here; [`constant`] does.
pub struct Tape {
    nodes: Vec<Node>,
    slots: HashMap<TensorId, usize>,
    constants: HashSet<TensorId>,
    /// By slot: whether a later op used it.
    used: Vec<bool>,
    /// Shapes of the inputs, which have the first slots.
    inputs: Vec<Shape>,
}

struct Node {
    op: Box<dyn Backward>,
    inputs: Vec<Option<usize>>,
    saved: Vec<Tensor>,
    output: Option<Tensor>,
    shape: Shape,
    slot: usize,
    weights: Vec<Trained>,
}

/// Where the gradient of a weight goes, as it was when the op ran.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Trained {
    No,
    /// Into the weight's own sum.
    Sum,
    /// To a recorded tensor that the weight is made of.
    Recorded(usize),
}

/// Puts back what was being recorded before, however the scope is left.
struct Restore(Option<Tape>);

impl Drop for Restore {
    fn drop(&mut self) {
        CURRENT.set(self.0.take());
    }
}

/// Runs `f`, recording the ops over `inputs` (different tensors, each of which gets a gradient) and over trained weights.
///
/// # Errors
/// Those of `f`.
pub fn record<R, E>(
    inputs: &[&Tensor],
    f: impl FnOnce() -> std::result::Result<R, E>,
) -> std::result::Result<(R, Tape), E> {
    let tape = Tape {
        nodes: vec![],
        slots: inputs.iter().enumerate().map(|(slot, x)| (x.id(), slot)).collect(),
        constants: HashSet::new(),
        used: vec![false; inputs.len()],
        inputs: inputs.iter().map(|x| x.shape().clone()).collect(),
    };
    let before = Restore(CURRENT.replace(Some(tape)));
    let made = f()?;
    let tape = CURRENT.take();
    drop(before);
    match tape {
        Some(tape) => Ok((made, tape)),
        None => unreachable!("whoever takes the tape puts it back"),
    }
}

/// Whether this thread records.
pub(crate) fn recording() -> bool {
    CURRENT.with_borrow(Option::is_some)
}

/// Whether a gradient of `x` is asked for, on either tape.
pub(crate) fn is_tracked(x: &Tensor) -> bool {
    x.track_op() || (grad_enabled() && slot_of(x).is_some())
}

fn slot_of(x: &Tensor) -> Option<usize> {
    CURRENT.with_borrow(|tape| tape.as_ref().and_then(|tape| tape.slots.get(&x.id()).copied()))
}

/// `y` holds the values of `x` in the same order: on a tape it is the same.
fn alias(x: &Tensor, y: Tensor) -> Tensor {
    CURRENT.with_borrow_mut(|tape| {
        let Some(tape) = tape else { return };
        if !grad_enabled() {
            tape.stop(&[x], &y);
        } else if let Some(&slot) = tape.slots.get(&x.id()) {
            tape.slots.insert(y.id(), slot);
        } else if tape.constants.contains(&x.id()) {
            tape.constants.insert(y.id());
        }
    });
    y
}

/// `x` without gaps, the same on a tape.
pub(crate) fn dense(x: &Tensor) -> Result<Tensor> {
    if x.is_contiguous() { Ok(x.clone()) } else { Ok(alias(x, x.contiguous()?)) }
}

/// The values of `x` as a constant: no gradient goes through it.
///
/// # Errors
/// None that can be met: its shape is its own.
pub fn constant(x: &Tensor) -> Result<Tensor> {
    // Detaching keeps the identity of a tensor that is not on candle's tape; a view has its own.
    let y = x.detach().reshape(x.shape())?;
    CURRENT.with_borrow_mut(|tape| {
        if let Some(tape) = tape {
            tape.stop(&[x], &y);
        }
    });
    Ok(y)
}

/// The result of an op over `inputs`, on the tape that is in use.
pub(crate) fn finish(op: impl Backward, inputs: &[&Tensor], y: CpuStorage, shape: impl Into<Shape>) -> Result<Tensor> {
    if !recording() {
        return candle_tape::record(op, inputs, y, shape.into());
    }
    let y = tensor_of(y, shape.into())?;
    if grad_enabled() {
        return push(op, inputs, y, false);
    }
    CURRENT.with_borrow_mut(|tape| {
        if let Some(tape) = tape {
            tape.stop(inputs, &y);
        }
    });
    Ok(y)
}

/// `y`, made by `op` of `inputs`, on the tape of this thread: recorded if there is anything to differentiate or `always`,
/// else a constant.
fn push(op: impl Backward, inputs: &[&Tensor], y: Tensor, always: bool) -> Result<Tensor> {
    CURRENT.with_borrow_mut(|tape| {
        let Some(tape) = tape else { return Ok(y) };
        let held = op.weights();
        let of_tensors = held.iter().filter_map(|w| w.tensor());
        tape.check(op.name(), inputs.iter().copied().chain(of_tensors))?;
        let slots: Vec<Option<usize>> = inputs.iter().map(|x| tape.slots.get(&x.id()).copied()).collect();
        let trained = |weight: &&Weight| match weight.tensor().and_then(|x| tape.slots.get(&x.id())) {
            Some(slot) => Trained::Recorded(*slot),
            _ if weight.grad().is_some() => Trained::Sum,
            _ => Trained::No,
        };
        let weights: Vec<Trained> = held.iter().map(trained).collect();
        if !always && slots.iter().all(Option::is_none) && weights.iter().all(|w| *w == Trained::No) {
            tape.constants.insert(y.id());
            return Ok(y);
        }
        let recorded = weights.iter().filter_map(|w| if let Trained::Recorded(slot) = w { Some(slot) } else { None });
        for slot in slots.iter().flatten().chain(recorded) {
            tape.used[*slot] = true;
        }
        let slot = tape.used.len();
        tape.used.push(false);
        tape.slots.insert(y.id(), slot);
        let saved = match op.saves() {
            Saves::Nothing => vec![],
            Saves::Inputs | Saves::InputsAndOutput => inputs.iter().map(|x| (*x).clone()).collect(),
        };
        let output = (op.saves() == Saves::InputsAndOutput).then(|| y.clone());
        let shape = y.shape().clone();
        tape.nodes.push(Node { op: Box::new(op), inputs: slots, saved, output, shape, slot, weights });
        Ok(y)
    })
}

impl Tape {
    /// Fails if an operand comes from elsewhere than a recorded op or a constant.
    fn check<'a>(&self, name: &str, operands: impl Iterator<Item = &'a Tensor>) -> Result<()> {
        for x in operands {
            if x.track_op() {
                bail!("{name}: an operand is on candle's tape, but a `Tape` is recording; detach it, or do not record")
            }
            if !self.slots.contains_key(&x.id()) && !self.constants.contains(&x.id()) {
                bail!(
                    "{name}: an operand {:?} is not on the tape: a candle op on the way to it would cut the gradient; use \
                     `reshape`, `narrow` or `composed_of` of tallow_ops, or `constant` if no gradient is to go through it",
                    x.shape()
                )
            }
        }
        Ok(())
    }

    /// `y` holds values of `x`, whose gradient is not to go through it.
    fn stop(&mut self, x: &[&Tensor], y: &Tensor) {
        self.constants.insert(y.id());
        for slot in x.iter().filter_map(|x| self.slots.get(&x.id())) {
            self.used[*slot] = true;
        }
    }

    /// Whether nothing was recorded, because nothing in it is trained.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Whether `y` depends on anything recorded.
    pub fn holds(&self, y: &Tensor) -> bool {
        self.slots.contains_key(&y.id())
    }

    /// Runs backward from `y`, whose gradient is `dy`: adds the gradients of the weights to their slots and returns those of
    /// the inputs, in their order. They may share memory with each other and with `dy`: not to be written to.
    ///
    /// # Errors
    /// If `y` does not depend on anything recorded, if the gradient was cut somewhere, or an op fails.
    pub fn backward(mut self, y: Tensor, dy: Tensor) -> Result<Vec<Tensor>> {
        if y.elem_count() != dy.elem_count() || y.dtype() != dy.dtype() {
            bail!("backward: y is {:?} {:?} but dy {:?} {:?}", y.shape(), y.dtype(), dy.shape(), dy.dtype())
        }
        let Some(&last) = self.slots.get(&y.id()) else {
            bail!("backward: y {:?} depends on nothing that was recorded: a candle op cuts the gradient", y.shape())
        };
        self.used[last] = true;
        if let Some(node) = self.nodes.iter().find(|node| !self.used[node.slot]) {
            bail!(
                "the result of {} {:?} is used by nothing that was recorded: a candle op on it cuts the gradient; use \
                 `reshape`, `narrow` or `composed_of` of tallow_ops",
                node.op.name(),
                node.shape
            )
        }
        let mut grads: Vec<Slot> = self.used.iter().map(|_| Slot::Empty).collect();
        grads[last] = Slot::Shared(dy.detach().contiguous()?);
        // Neither is held longer than its gradient is needed.
        drop((y, dy));
        while let Some(node) = self.nodes.pop() {
            node.backward(&mut grads)?;
        }
        let given = self.inputs.into_iter().zip(grads).enumerate();
        given
            .map(|(i, (shape, slot))| match slot.into_tensor() {
                Some(dx) => dx.reshape(shape),
                None => bail!("backward: input {i} got no gradient: nothing recorded uses it"),
            })
            .collect()
    }
}

impl Node {
    fn backward(self, grads: &mut [Slot]) -> Result<()> {
        // None: its result was used by `constant` alone, or by ops whose results were.
        let Some(dy) = grads[self.slot].take().into_tensor() else {
            if self.op.has_given_already() {
                bail!("{}: no gradient reaches it, but its weights have theirs already", self.op.name())
            }
            return Ok(());
        };
        let dy = dy.reshape(self.shape)?;
        let held = self.op.weights();
        let weights = held.iter().zip(&self.weights).map(|(weight, trained)| match (trained, weight.grad()) {
            (Trained::Sum, Some(sum)) => WeightSlot::Slot(sum),
            (Trained::Recorded(_), _) => WeightSlot::Tape(weight, None),
            _ => WeightSlot::Unwanted,
        });
        // An operand that comes twice has its sum in the first place only.
        let slots = self.inputs.iter().map(|slot| slot.map_or(Slot::Unwanted, |slot| grads[slot].take()));
        let mut given = Gradients::new(slots.collect(), weights.collect());
        let saved = Saved { inputs: &self.saved, output: self.output.as_ref() };
        {
            let _span = trace::op_backward(self.op.name(), || self.op.cost());
            self.op.backward(saved, &dy, &mut given)?;
        }
        let (sums, weight_sums) = given.finish(self.op.name())?;
        for (slot, sum) in self.inputs.iter().zip(sums) {
            if let Some(slot) = slot {
                grads[*slot].add(sum)?;
            }
        }
        for (trained, sum) in self.weights.iter().zip(weight_sums) {
            if let (Trained::Recorded(slot), Some(dw)) = (trained, sum.into_tensor()?) {
                grads[*slot].add(Slot::Owned(dw))?;
            }
        }
        Ok(())
    }
}

/// `x` with another shape of as many elements, one of which may be `()` for the rest: its gradient is the same values.
///
/// # Errors
/// If the numbers of elements differ.
pub fn reshape(x: &Tensor, shape: impl ShapeWithOneHole) -> Result<Tensor> {
    Ok(alias(x, x.reshape(shape)?))
}

/// `len` places of dimension `dim` from `start`, as a view.
///
/// # Errors
/// If the range is not within the dimension.
pub fn narrow(x: &Tensor, dim: usize, start: usize, len: usize) -> Result<Tensor> {
    let y = x.narrow(dim, start, len)?;
    if !recording() || (y.id() == x.id() && grad_enabled()) {
        return Ok(y);
    }
    if !grad_enabled() {
        return constant(&y);
    }
    let inner: usize = x.dims()[dim + 1..].iter().product();
    let op = Narrow { shape: x.shape().clone(), row: x.dims()[dim] * inner, from: start * inner, len: len * inner };
    push(op, &[x], y, false)
}

struct Narrow {
    shape: Shape,
    /// Elements of a row of the whole, where in it the view begins, and how long it is.
    row: usize,
    from: usize,
    len: usize,
}

impl Backward for Narrow {
    fn name(&self) -> &'static str {
        "narrow"
    }

    fn saves(&self) -> Saves {
        Saves::Nothing
    }

    fn cost(&self) -> Cost {
        Cost::bytes(2 * 4 * self.shape.elem_count() * self.len / self.row.max(1))
    }

    fn backward(&self, _: Saved<'_>, dy: &Tensor, grads: &mut Gradients<'_>) -> Result<()> {
        let &Self { row, from, len, .. } = self;
        crate::operand::with_dtype!(self.name(), dy.dtype(), T => {
            let (ds, dl) = dy.storage_and_layout();
            let dy = crate::operand::view::<T>(&ds, dl)?;
            grads.write(0, &self.shape, |dx: &mut [T], add| {
                tallow_kernels::elementwise::scatter_columns(dy, (row, from, len), add, dx);
                Ok(())
            })
        })
    }
}

/// Runs `f`, which composes candle ops, as one op over `inputs`: on any tape, with the gradients that candle computes. So do
/// ops of other crates enter a recording. Trained weights may be captured; a recorded tensor must be among the inputs: a
/// captured one is a constant.
///
/// # Errors
/// Those of `f`; in backward, if an op in it cuts the gradient of an input.
pub fn composed_of(
    name: &'static str,
    inputs: &[&Tensor],
    f: impl FnOnce(&[Tensor]) -> Result<Tensor>,
) -> Result<Tensor> {
    if !recording() || !grad_enabled() {
        let y = f(&inputs.iter().map(|x| (*x).clone()).collect::<Vec<_>>())?;
        return if recording() { constant(&y) } else { Ok(y) };
    }
    CURRENT.with_borrow(|tape| match tape {
        Some(tape) => tape.check(name, inputs.iter().copied()),
        None => Ok(()),
    })?;
    let mut vars = vec![];
    for x in inputs {
        vars.push(match slot_of(x) {
            Some(_) => Var::from_tensor(x)?.into_inner(),
            None => x.detach(),
        });
    }
    let y = {
        // Inside, ops of this crate go on candle's tape as well.
        let _recorded = Restore(CURRENT.take());
        f(&vars)?
    };
    if !y.track_op() {
        if vars.iter().any(|var| var.track_op()) {
            bail!("{name}: the ops in it cut the gradient; use `constant` if that is meant")
        }
        return constant(&y);
    }
    let detached = y.detach();
    push(Composed { name, y, vars }, inputs, detached, true)
}

struct Composed {
    name: &'static str,
    y: Tensor,
    vars: Vec<Tensor>,
}

impl Backward for Composed {
    fn name(&self) -> &'static str {
        self.name
    }

    fn saves(&self) -> Saves {
        Saves::Nothing
    }

    fn cost(&self) -> Cost {
        Cost::default()
    }

    fn backward(&self, _: Saved<'_>, dy: &Tensor, grads: &mut Gradients<'_>) -> Result<()> {
        let mut made = backward_from(&self.y, dy)?;
        for (i, var) in self.vars.iter().enumerate().filter(|(_, var)| var.track_op()) {
            let Some(dx) = made.remove(var) else {
                bail!("{}: an op in it cuts the gradient of operand {i}", self.name)
            };
            grads.pass(i, &dx.detach().contiguous()?)?;
        }
        if made.get_ids().next().is_some() {
            bail!("{}: a variable in it is none of its inputs, and its gradient would be lost", self.name)
        }
        Ok(())
    }
}
