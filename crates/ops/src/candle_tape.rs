//! Ops on candle's own tape, for code that differentiates with `Tensor::backward`.

use std::sync::Mutex;

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};

use crate::Weight;
use crate::gradients::{Backward, Gradients, Saved, Slot, WeightSlot};
use crate::operand::tensor_of;
use crate::trace;

/// The most operands that candle records: inputs and weights together.
const MOST: usize = 3;

/// Puts a result on candle's tape if one of its operands is there.
pub(crate) fn record(op: impl Backward, inputs: &[&Tensor], y: CpuStorage, shape: Shape) -> Result<Tensor> {
    let weights = op.weights();
    if !inputs.iter().any(|x| x.track_op()) && !weights.iter().any(|w| w.needs_grad()) {
        return tensor_of(y, shape);
    }
    let operands = inputs.iter().map(|x| (*x).clone());
    let mut operands: Vec<Tensor> = operands.chain(weights.iter().map(operand).collect::<Result<Vec<_>>>()?).collect();
    if operands.len() > MOST {
        bail!("{}: {} operands, candle's tape takes {MOST}", op.name(), operands.len())
    }
    let filler = operands[0].detach();
    operands.resize(MOST, filler);
    let num_inputs = inputs.len();
    operands[0].apply_op3(
        &operands[1],
        &operands[2],
        OnCandle { op: Box::new(op), num_inputs, made: Mutex::new(Some((y, shape))) },
    )
}

/// A weight's place among the operands; that of a packed one, which has no gradient, is held by a constant.
fn operand(weight: &&Weight) -> Result<Tensor> {
    match weight.operand() {
        Some(operand) => Ok(operand.clone()),
        None => Tensor::zeros(1, weight.dtype(), weight.device()),
    }
}

struct OnCandle {
    op: Box<dyn Backward>,
    num_inputs: usize,
    /// The result, until candle asks for it.
    made: Mutex<Option<(CpuStorage, Shape)>>,
}

impl CustomOp3 for OnCandle {
    fn name(&self) -> &'static str {
        self.op.name()
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        match self.made.lock().ok().and_then(|mut made| made.take()) {
            Some(made) => Ok(made),
            None => bail!("{}: candle asked twice for the result of one op", self.name()),
        }
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let operands = [a, b, c].map(Tensor::clone);
        let weights = self.op.weights();
        let (inputs, rest) = operands.split_at(self.num_inputs);
        let slot = |x: &Tensor| if x.track_op() { Slot::Empty } else { Slot::Unwanted };
        let weight_slots = weights.iter().zip(rest).map(|(weight, operand)| match weight.grad() {
            _ if !operand.track_op() => WeightSlot::Unwanted,
            Some(sum) => WeightSlot::Slot(sum),
            _ => WeightSlot::Tape(weight, None),
        });
        let mut grads = Gradients::new(inputs.iter().map(slot).collect(), weight_slots.collect());
        let saved = Saved { inputs, output: Some(y) };
        {
            let _span = trace::op_backward(self.op.name(), || self.op.cost());
            self.op.backward(saved, &dy.contiguous()?, &mut grads)?;
        }
        let (given, weight_sums) = grads.finish(self.name())?;
        let mut all = Vec::with_capacity(MOST);
        for (slot, input) in given.into_iter().zip(inputs) {
            all.push(slot.into_tensor().map(|dx| dx.reshape(input.shape())).transpose()?);
        }
        for slot in weight_sums {
            all.push(slot.into_tensor()?);
        }
        let mut all = all.into_iter().chain(std::iter::repeat_with(|| None));
        let mut next = || all.next().flatten();
        Ok((next(), next(), next()))
    }
}
