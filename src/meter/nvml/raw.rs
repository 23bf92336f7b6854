//! The calls that nvml-wrapper lacks, or makes through functions that NVIDIA has withdrawn. Every answer is held against
//! what was asked before it counts: an answer of another shape is a reason, never a number.

#![allow(unsafe_code)]

use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device, Nvml};
use nvml_wrapper_sys::bindings::{
    NvmlLib, nvmlDevice_t, nvmlFieldValue_t, nvmlReturn_enum_NVML_ERROR_DEPRECATED as DEPRECATED,
    nvmlReturn_enum_NVML_ERROR_UNKNOWN as UNKNOWN, nvmlReturn_enum_NVML_SUCCESS as SUCCESS, nvmlReturn_t,
    nvmlSystemDriverBranchInfo_v1_t, nvmlTemperature_v1_t, nvmlValue_t,
    nvmlValueType_enum_NVML_VALUE_TYPE_COUNT as NO_TYPE,
    nvmlValueType_enum_NVML_VALUE_TYPE_SIGNED_INT as SIGNED_INT,
    nvmlValueType_enum_NVML_VALUE_TYPE_SIGNED_LONG_LONG as SIGNED_LONG_LONG,
    nvmlValueType_enum_NVML_VALUE_TYPE_UNSIGNED_INT as UNSIGNED_INT,
    nvmlValueType_enum_NVML_VALUE_TYPE_UNSIGNED_LONG as UNSIGNED_LONG,
    nvmlValueType_enum_NVML_VALUE_TYPE_UNSIGNED_LONG_LONG as UNSIGNED_LONG_LONG,
};

use crate::meter::samples::Reason;

/// Which part of a module a power field is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    Gpu = 0,
    /// GPU, CPU and memory of a superchip.
    Module = 1,
}

fn check(code: nvmlReturn_t) -> Result<(), Reason> {
    match code {
        SUCCESS => Ok(()),
        DEPRECATED => Err("deprecated".to_owned()),
        other => Err(reason(&NvmlError::from(other))),
    }
}

/// The reason code of an answer.
pub(super) fn reason(error: &NvmlError) -> Reason {
    let code = match error {
        NvmlError::LibloadingError(_) | NvmlError::LibraryNotFound => "no_nvml",
        NvmlError::FailedToLoadSymbol(_) | NvmlError::FunctionNotFound => "function_not_found",
        NvmlError::DriverNotLoaded => "driver_not_loaded",
        NvmlError::NotSupported => "not_supported",
        NvmlError::NoPermission => "no_permission",
        NvmlError::GpuLost => "gpu_is_lost",
        NvmlError::ResetRequired => "gpu_needs_reset",
        NvmlError::NotFound => "not_found",
        NvmlError::LibRmVersionMismatch => "driver_library_mismatch",
        NvmlError::UnexpectedVariant(DEPRECATED) => "deprecated",
        NvmlError::UnexpectedVariant(code) => return format!("nvml_error_{code}"),
        _ => "nvml_error",
    };
    code.to_owned()
}

fn missing_function<E>(_: E) -> Reason {
    "function_not_found".to_owned()
}

fn library<'a>(device: &Device<'a>) -> &'a NvmlLib {
    device.nvml().lib()
}

fn handle(device: &Device<'_>) -> nvmlDevice_t {
    // SAFETY: the handle is only passed to functions of the library that made it, which lives as long as the program.
    unsafe { device.handle() }
}

/// A field by its number.
pub(super) fn field(device: &Device<'_>, id: u32, scope: Scope) -> Result<u64, Reason> {
    let call = library(device).nvmlDeviceGetFieldValues.as_ref().map_err(missing_function)?;
    // A library that fills in nothing leaves an error and a type that does not exist.
    let mut value = nvmlFieldValue_t {
        fieldId: id,
        scopeId: scope as u32,
        timestamp: 0,
        latencyUsec: 0,
        valueType: NO_TYPE,
        nvmlReturn: UNKNOWN,
        value: nvmlValue_t { ullVal: 0 },
    };
    // SAFETY: the function has this signature in every NVML since R384; it writes to one structure, which lives here.
    check(unsafe { call(handle(device), 1, &raw mut value) })?;
    check(value.nvmlReturn)?;
    if (value.fieldId, value.scopeId) != (id, scope as u32) {
        return Err("answer_to_another_question".to_owned());
    }
    number(&value).ok_or_else(|| "answer_of_another_type".to_owned())
}

fn number(value: &nvmlFieldValue_t) -> Option<u64> {
    // SAFETY: the type says which member was written, and every bit pattern is a value of each of these members.
    unsafe {
        match value.valueType {
            UNSIGNED_INT => Some(u64::from(value.value.uiVal)),
            UNSIGNED_LONG => Some(value.value.ulVal),
            UNSIGNED_LONG_LONG => Some(value.value.ullVal),
            SIGNED_INT => u64::try_from(value.value.siVal).ok(),
            SIGNED_LONG_LONG => u64::try_from(value.value.sllVal).ok(),
            _ => None,
        }
    }
}

/// Why clocks are held down, with every bit that the driver sets; the function has two names.
pub(super) fn clock_reasons(device: &Device<'_>) -> Result<u64, Reason> {
    let library = library(device);
    let new = library.nvmlDeviceGetCurrentClocksEventReasons.as_ref();
    let old = library.nvmlDeviceGetCurrentClocksThrottleReasons.as_ref();
    let mut reason = Err("function_not_found".to_owned());
    for call in [new.ok(), old.ok()].into_iter().flatten() {
        let mut mask = 0;
        // SAFETY: both functions have this signature; they write one 64-bit integer, which lives here.
        match check(unsafe { call(handle(device), &raw mut mask) }) {
            Ok(()) => return Ok(mask),
            Err(code) => reason = Err(code),
        }
    }
    reason
}

/// Release branch of the driver.
pub(super) fn driver_branch(nvml: &Nvml) -> Result<String, Reason> {
    let call = nvml.lib().nvmlSystemGetDriverBranch.as_ref().map_err(missing_function)?;
    let version = size_of::<nvmlSystemDriverBranchInfo_v1_t>() as u32 | 1 << 24;
    let mut info = nvmlSystemDriverBranchInfo_v1_t { version, branch: [0; 80] };
    // SAFETY: the structure says its own version and size, which the function checks before it writes to it.
    check(unsafe { call(&raw mut info, info.branch.len() as u32) })?;
    let bytes: Vec<u8> = info.branch.iter().map(|c| *c as u8).take_while(|byte| *byte != 0).collect();
    match String::from_utf8(bytes) {
        Ok(branch) if !branch.is_empty() => Ok(branch),
        _ => Err("answer_of_another_type".to_owned()),
    }
}

/// Rows of memory that were replaced.
pub(super) struct Remapped {
    pub(super) corrected: u32,
    pub(super) uncorrected: u32,
    pub(super) is_pending: bool,
    pub(super) has_failed: bool,
}

pub(super) fn remapped_rows(device: &Device<'_>) -> Result<Remapped, Reason> {
    let call = library(device).nvmlDeviceGetRemappedRows.as_ref().map_err(missing_function)?;
    let (mut corrected, mut uncorrected, mut pending, mut failed) = (0, 0, 0, 0);
    let handle = handle(device);
    // SAFETY: the function has this signature in every NVML since R450; it writes four integers, which live here.
    check(unsafe {
        call(handle, &raw mut corrected, &raw mut uncorrected, &raw mut pending, &raw mut failed)
    })?;
    Ok(Remapped { corrected, uncorrected, is_pending: pending != 0, has_failed: failed != 0 })
}

/// Temperature of the GPU, °C, by the function that replaces the withdrawn one.
pub(super) fn temperature_c(device: &Device<'_>) -> Result<i32, Reason> {
    let call = library(device).nvmlDeviceGetTemperatureV.as_ref().map_err(missing_function)?;
    let version = size_of::<nvmlTemperature_v1_t>() as u32 | 1 << 24;
    let mut temperature = nvmlTemperature_v1_t { version, sensorType: 0, temperature: i32::MIN };
    // SAFETY: the structure says its own version and size, which the function checks before it writes to it.
    check(unsafe { call(handle(device), &raw mut temperature) })?;
    if temperature.temperature == i32::MIN {
        return Err("answer_of_another_type".to_owned());
    }
    Ok(temperature.temperature)
}
