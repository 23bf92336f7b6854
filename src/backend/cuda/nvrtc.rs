//! The kernel compiler: source text and in-memory headers to a CUBIN or to PTX. The library must have been made ready.

use std::ffi::{CStr, CString, c_char};

use anyhow::{Context as _, bail};
use cudarc::nvrtc::sys::{self, nvrtcResult};

use super::compile::Form;

/// Version of the compiler, `13.0`.
#[allow(unsafe_code)]
pub(super) fn version() -> anyhow::Result<String> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the library is present; both outlive the call.
    check("nvrtcVersion", unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor) })?;
    Ok(format!("{major}.{minor}"))
}

/// Compiles `source` (named `name` in messages) to machine code, or to intermediate code without its ending zero.
///
/// # Errors
/// With the compiler's log.
#[allow(unsafe_code)]
pub(super) fn compile(
    name: &str,
    source: &str,
    headers: &[(&str, &str)],
    options: &[String],
    form: Form,
) -> anyhow::Result<Vec<u8>> {
    let program = Program::new(name, source, headers)?;
    let options = c_strings(options.iter().map(String::as_str))?;
    let pointers: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
    // SAFETY: the program lives, and so do the strings.
    let result = unsafe { sys::nvrtcCompileProgram(program.0, pointers.len() as i32, pointers.as_ptr()) };
    if result != nvrtcResult::NVRTC_SUCCESS {
        let hint = match result {
            nvrtcResult::NVRTC_ERROR_INVALID_OPTION => {
                "\nhint: this compiler does not know the device: pip install a newer nvidia-cuda-nvrtc"
            }
            _ => "",
        };
        bail!("compiling {name}: {}\n{}{hint}", text(result), program.log().trim_end());
    }
    let image = match form {
        Form::Sass => program.cubin()?,
        Form::Ptx => program.ptx()?,
    };
    if image.is_empty() {
        bail!("compiling {name}: the compiler made no {} for {}", form.name(), options[0].to_string_lossy());
    }
    Ok(image)
}

struct Program(sys::nvrtcProgram);

impl Program {
    #[allow(unsafe_code)]
    fn new(name: &str, source: &str, headers: &[(&str, &str)]) -> anyhow::Result<Self> {
        let (name, source) = (CString::new(name)?, CString::new(source)?);
        let texts = c_strings(headers.iter().map(|(_, text)| *text))?;
        let names = c_strings(headers.iter().map(|(name, _)| *name))?;
        let texts: Vec<*const c_char> = texts.iter().map(|text| text.as_ptr()).collect();
        let included: Vec<*const c_char> = names.iter().map(|name| name.as_ptr()).collect();
        let mut program = std::ptr::null_mut();
        // SAFETY: every string is terminated and outlives the call, which copies them; both lists have `headers.len()`.
        check("nvrtcCreateProgram", unsafe {
            sys::nvrtcCreateProgram(
                &raw mut program,
                source.as_ptr(),
                name.as_ptr(),
                headers.len() as i32,
                texts.as_ptr(),
                included.as_ptr(),
            )
        })?;
        Ok(Program(program))
    }

    /// Of a compiled program.
    #[allow(unsafe_code)]
    fn cubin(&self) -> anyhow::Result<Vec<u8>> {
        let mut size = 0;
        // SAFETY: the program lives and was compiled.
        check("nvrtcGetCUBINSize", unsafe { sys::nvrtcGetCUBINSize(self.0, &raw mut size) })?;
        let mut image = vec![0u8; size];
        // SAFETY: `image` has the size that was just asked for.
        check("nvrtcGetCUBIN", unsafe { sys::nvrtcGetCUBIN(self.0, image.as_mut_ptr().cast()) })?;
        Ok(image)
    }

    /// Of a compiled program.
    #[allow(unsafe_code)]
    fn ptx(&self) -> anyhow::Result<Vec<u8>> {
        let mut size = 0;
        // SAFETY: the program lives and was compiled.
        check("nvrtcGetPTXSize", unsafe { sys::nvrtcGetPTXSize(self.0, &raw mut size) })?;
        let mut text = vec![0u8; size];
        // SAFETY: `text` has the size that was just asked for.
        check("nvrtcGetPTX", unsafe { sys::nvrtcGetPTX(self.0, text.as_mut_ptr().cast()) })?;
        // The size counts the zero at the end.
        while text.last() == Some(&0) {
            text.pop();
        }
        Ok(text)
    }

    #[allow(unsafe_code)]
    fn log(&self) -> String {
        let mut size = 0;
        // SAFETY: the program lives.
        if unsafe { sys::nvrtcGetProgramLogSize(self.0, &raw mut size) } != nvrtcResult::NVRTC_SUCCESS {
            return String::new();
        }
        let mut log = vec![0u8; size];
        // SAFETY: `log` has the size that was just asked for.
        unsafe { sys::nvrtcGetProgramLog(self.0, log.as_mut_ptr().cast()) };
        String::from_utf8_lossy(&log).trim_end_matches('\0').to_owned()
    }
}

impl Drop for Program {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: made in `new`, destroyed once.
        let _ = unsafe { sys::nvrtcDestroyProgram(&raw mut self.0) };
    }
}

fn c_strings<'a>(texts: impl Iterator<Item = &'a str>) -> anyhow::Result<Vec<CString>> {
    texts.map(CString::new).collect::<Result<_, _>>().context("a source text has a zero byte")
}

fn check(call: &str, result: nvrtcResult) -> anyhow::Result<()> {
    match result {
        nvrtcResult::NVRTC_SUCCESS => Ok(()),
        code => bail!("{call}: {}", text(code)),
    }
}

#[allow(unsafe_code)]
fn text(code: nvrtcResult) -> String {
    // SAFETY: the library is present; it returns a static string for any code.
    let chars = unsafe { sys::nvrtcGetErrorString(code) };
    if chars.is_null() {
        return format!("{code:?}");
    }
    // SAFETY: not null, static and terminated.
    unsafe { CStr::from_ptr(chars) }.to_string_lossy().into_owned()
}
