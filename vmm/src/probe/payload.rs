//! The code that the probe's guest runs.

use kvm_bindings::CpuId;

/// Where the code lies.
pub(super) const CODE_START: u64 = 0x1_0000;
/// Memory for the instructions to work on; `rbx` points there.
pub(super) const BUFFER_START: u64 = 0x2_0000;
/// The guest writes here after each step.
pub(super) const REPORT_PORT: u16 = 0xf4;
/// Iterations of the timed loop, the last step.
pub(super) const LOOP_ITERATIONS: u32 = 200_000;

/// `out 0xf4, al`
const REPORT: [u8; 2] = [0xe6, REPORT_PORT as u8];
/// `hlt`
const HALT: u8 = 0xf4;

/// What the virtual processor has of that which is not in every x86-64.
#[derive(Clone, Copy, Debug)]
pub(super) struct Features {
    pub(super) cmpxchg16b: bool,
    pub(super) popcnt: bool,
    pub(super) xsave: bool,
}

impl Features {
    pub(super) fn of(cpuid: &CpuId) -> Self {
        let ecx = cpuid
            .as_slice()
            .iter()
            .find(|e| e.function == 1)
            .map_or(0, |e| e.ecx);
        Self {
            cmpxchg16b: ecx & (1 << 13) != 0,
            popcnt: ecx & (1 << 23) != 0,
            xsave: ecx & (1 << 26) != 0,
        }
    }
}

/// Code, and the names of its steps in order.
#[derive(Clone, Debug)]
pub(super) struct Payload {
    pub(super) code: Vec<u8>,
    pub(super) steps: Vec<&'static str>,
}

impl Payload {
    pub(super) fn new(features: &Features) -> Self {
        let mut payload = Self {
            code: Vec::new(),
            steps: Vec::new(),
        };
        payload.step("lock inc", &[0xf0, 0x48, 0xff, 0x03]);
        // xor eax, eax; cpuid; rbx is the buffer's address again afterwards.
        let [b0, b1, b2, b3] = (BUFFER_START as u32).to_le_bytes();
        payload.step("cpuid", &[0x31, 0xc0, 0x0f, 0xa2, 0xbb, b0, b1, b2, b3]);
        payload.step("lock xadd", &[0xf0, 0x48, 0x0f, 0xc1, 0x03]);
        if features.cmpxchg16b {
            payload.step("lock cmpxchg16b", &[0xf0, 0x48, 0x0f, 0xc7, 0x0b]);
        }
        if features.popcnt {
            payload.step("popcnt", &[0xf3, 0x48, 0x0f, 0xb8, 0xc3]);
        }
        payload.step("swapgs", &[0x0f, 0x01, 0xf8]);
        payload.step("invlpg", &[0x0f, 0x01, 0x3b]);
        payload.step("fxsave", &[0x0f, 0xae, 0x03]);
        if features.xsave {
            // mov eax, 3; xor edx, edx; xsave [rbx]
            let xsave = [0xb8, 3, 0, 0, 0, 0x31, 0xd2, 0x0f, 0xae, 0x23];
            payload.step("xsave", &xsave);
        }
        // movaps xmm0, [rbx]; addps xmm0, xmm0; movaps [rbx], xmm0
        let sse = [0x0f, 0x28, 0x03, 0x0f, 0x58, 0xc0, 0x0f, 0x29, 0x03];
        payload.step("SSE", &sse);
        // mov ecx, n; 1: lock inc qword [rbx]; dec ecx; jnz 1b
        let [n0, n1, n2, n3] = LOOP_ITERATIONS.to_le_bytes();
        let timed = [
            0xb9, n0, n1, n2, n3, 0xf0, 0x48, 0xff, 0x03, 0xff, 0xc9, 0x75, 0xf8,
        ];
        payload.step("a loop", &timed);
        payload.code.push(HALT);
        payload
    }

    fn step(&mut self, name: &'static str, code: &[u8]) {
        self.code.extend(code);
        self.code.extend(REPORT);
        self.steps.push(name);
    }
}
