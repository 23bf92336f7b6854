//! What the stand-in says of a GPU beside its power. A build with `--cfg withdrawn` has none of it, as old drivers and
//! cut-down ones. `refuse=CODE` makes every call here answer that code; `only=NAME` limits that to one function.

use super::{NOT_SUPPORTED, SUCCESS, STATE, put, put_text};
use std::ffi::{c_char, c_int, c_uint, c_ulonglong, c_void};

const INVALID_ARGUMENT: c_int = 2;
const VERSION_MISMATCH: c_int = 25;
const LINKS: c_uint = 4;

/// What this function answers instead of its value, if anything.
fn refused(name: &str) -> Option<c_int> {
    let state = STATE.lock().unwrap();
    let concerns = state.settings.get("only").is_none_or(|only| only == name);
    let code = state.number("refuse", 0.0) as c_int;
    (concerns && code != SUCCESS).then_some(code)
}

macro_rules! text {
    ($($name:ident = $text:expr;)*) => {$(
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(_device: *mut c_void, text: *mut c_char, length: c_uint) -> c_int {
            refused(stringify!($name)).unwrap_or_else(|| unsafe { put_text(text, length, $text) })
        }
    )*};
}

text! {
    nvmlDeviceGetSerial = "1650123456789";
    nvmlDeviceGetBoardPartNumber = "692-2G520-0200-000";
    nvmlDeviceGetVbiosVersion = "96.00.A5.00.01";
    nvmlDeviceGetInforomImageVersion = "G520.0200.00.05";
}

macro_rules! number {
    ($($name:ident = $number:expr;)*) => {$(
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(_device: *mut c_void, place: *mut c_uint) -> c_int {
            refused(stringify!($name)).unwrap_or_else(|| unsafe { put(place, $number) })
        }
    )*};
}

number! {
    nvmlDeviceGetNumGpuCores = 16896;
    nvmlDeviceGetMemoryBusWidth = 6144;
    nvmlDeviceGetInforomConfigurationChecksum = 0xbeef;
    nvmlDeviceGetPowerManagementLimit = 650_000;
    nvmlDeviceGetPowerManagementDefaultLimit = 700_000;
    nvmlDeviceGetPersistenceMode = 1;
    nvmlDeviceGetComputeMode = 3;
    nvmlDeviceGetVirtualizationMode = 1;
    nvmlDeviceGetMaxPcieLinkGeneration = 5;
    nvmlDeviceGetMaxPcieLinkWidth = 16;
    nvmlDeviceGetCurrPcieLinkGeneration = 4;
    nvmlDeviceGetCurrPcieLinkWidth = 8;
    nvmlDeviceGetPcieReplayCounter = 3;
    nvmlDeviceGetNumaNodeId = 1;
    nvmlDeviceGetPerformanceState = 2;
    nvmlDeviceGetRetiredPagesPendingStatus = 1;
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlSystemGetNVMLVersion(text: *mut c_char, length: c_uint) -> c_int {
    refused("nvmlSystemGetNVMLVersion").unwrap_or_else(|| unsafe { put_text(text, length, "13.580.95.05") })
}

#[repr(C)]
pub struct BranchInfo {
    version: c_uint,
    branch: [c_char; 80],
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlSystemGetDriverBranch(info: *mut BranchInfo, length: c_uint) -> c_int {
    let info = unsafe { &mut *info };
    if info.version != (1 << 24 | 84) {
        return VERSION_MISMATCH;
    }
    let place = info.branch.as_mut_ptr();
    refused("nvmlSystemGetDriverBranch").unwrap_or_else(|| unsafe { put_text(place, length, "r580_00") })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlSystemGetProcessName(pid: c_uint, text: *mut c_char, length: c_uint) -> c_int {
    let name = format!("/home/somebody/bin/trainer-{pid} --token=secret");
    refused("nvmlSystemGetProcessName").unwrap_or_else(|| unsafe { put_text(text, length, &name) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetGspFirmwareVersion(_device: *mut c_void, text: *mut c_char) -> c_int {
    refused("nvmlDeviceGetGspFirmwareVersion").unwrap_or_else(|| unsafe { put_text(text, 80, "580.95.05") })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetGspFirmwareMode(
    _device: *mut c_void,
    is_enabled: *mut c_uint,
    is_default: *mut c_uint,
) -> c_int {
    unsafe { put(is_default, 1) };
    refused("nvmlDeviceGetGspFirmwareMode").unwrap_or_else(|| unsafe { put(is_enabled, 1) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetPowerManagementLimitConstraints(
    _device: *mut c_void,
    least: *mut c_uint,
    most: *mut c_uint,
) -> c_int {
    unsafe { put(least, 200_000) };
    refused("nvmlDeviceGetPowerManagementLimitConstraints").unwrap_or_else(|| unsafe { put(most, 700_000) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMaxClockInfo(_device: *mut c_void, kind: c_uint, clock: *mut c_uint) -> c_int {
    let clocks = [1980, 1981, 2619];
    refused("nvmlDeviceGetMaxClockInfo")
        .unwrap_or_else(|| unsafe { put(clock, clocks.get(kind as usize).copied().unwrap_or(0)) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetEccMode(_device: *mut c_void, now: *mut c_uint, next: *mut c_uint) -> c_int {
    unsafe { put(next, 0) };
    refused("nvmlDeviceGetEccMode").unwrap_or_else(|| unsafe { put(now, 1) })
}

/// 11 and 12 corrected, 21 and 22 uncorrected: of this load, of the board's life.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetTotalEccErrors(
    _device: *mut c_void,
    kind: c_uint,
    counter: c_uint,
    count: *mut c_ulonglong,
) -> c_int {
    let errors = 10 * (u64::from(kind) + 1) + u64::from(counter) + 1;
    refused("nvmlDeviceGetTotalEccErrors").unwrap_or_else(|| unsafe { put(count, errors) })
}

/// One page after an uncorrected error, none else.
unsafe fn retired_pages(cause: c_uint, count: *mut c_uint) -> c_int {
    let pages = u32::from(cause == 1);
    let room = unsafe { count.read() };
    unsafe { put(count, pages) };
    let code = if room < pages { 7 } else { SUCCESS };
    refused("nvmlDeviceGetRetiredPages").unwrap_or(code)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetRetiredPages(
    _device: *mut c_void,
    cause: c_uint,
    count: *mut c_uint,
    _addresses: *mut c_ulonglong,
) -> c_int {
    unsafe { retired_pages(cause, count) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetRetiredPages_v2(
    _device: *mut c_void,
    cause: c_uint,
    count: *mut c_uint,
    _addresses: *mut c_ulonglong,
    _times: *mut c_ulonglong,
) -> c_int {
    unsafe { retired_pages(cause, count) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetRemappedRows(
    _device: *mut c_void,
    corrected: *mut c_uint,
    uncorrected: *mut c_uint,
    pending: *mut c_uint,
    failed: *mut c_uint,
) -> c_int {
    unsafe { put(corrected, 5) };
    unsafe { put(uncorrected, 6) };
    unsafe { put(pending, 1) };
    refused("nvmlDeviceGetRemappedRows").unwrap_or_else(|| unsafe { put(failed, 0) })
}

#[repr(C)]
pub struct Pci {
    legacy: [c_char; 16],
    domain: c_uint,
    bus: c_uint,
    device: c_uint,
    device_id: c_uint,
    subsystem_id: c_uint,
    address: [c_char; 32],
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetPciInfo_v3(_device: *mut c_void, pci: *mut Pci) -> c_int {
    if let Some(code) = refused("nvmlDeviceGetPciInfo_v3") {
        return code;
    }
    let pci = unsafe { &mut *pci };
    (pci.domain, pci.bus, pci.device) = (0, 0x1b, 0);
    (pci.device_id, pci.subsystem_id) = (0x2335_10de, 0x18be_10de);
    unsafe { put_text(pci.legacy.as_mut_ptr(), 16, "0000:1B:00.0") };
    unsafe { put_text(pci.address.as_mut_ptr(), 32, "00000000:1B:00.0") }
}

/// Four links, the last one down.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetNvLinkState(_device: *mut c_void, link: c_uint, is_up: *mut c_uint) -> c_int {
    if link >= LINKS {
        return INVALID_ARGUMENT;
    }
    refused("nvmlDeviceGetNvLinkState").unwrap_or_else(|| unsafe { put(is_up, u32::from(link + 1 < LINKS)) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetNvLinkErrorCounter(
    _device: *mut c_void,
    link: c_uint,
    _counter: c_uint,
    count: *mut c_ulonglong,
) -> c_int {
    refused("nvmlDeviceGetNvLinkErrorCounter").unwrap_or_else(|| unsafe { put(count, u64::from(link)) })
}

/// Nobody draws and nobody shares.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlDeviceGetGraphicsRunningProcesses_v3(
    _device: *mut c_void,
    _count: *mut c_uint,
    _list: *mut c_void,
) -> c_int {
    NOT_SUPPORTED
}
