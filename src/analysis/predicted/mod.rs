//! What was measured beside what had been predicted: the prediction's file (`scripts/predict_kernels.py` writes it), what
//! `peaks --ops` and records say of the same steps, and the distance between them. A prediction is frozen by its commit
//! before the first measurement; a miss says that its model is wrong there, not that the kernel is.

mod beside;
mod file;
mod measured;

pub use beside::{Beside, Row, Side, TOLERANCE_RATIO, beside};
pub use file::{
    Assumption, Basis, MachineCode, PredictedDevice, PredictedKernel, PredictedOp, PredictedStep, Prediction,
    Products, parse_prediction,
};
pub use measured::{Measured, MeasuredTime, is_peaks, of_record, parse_peaks};
