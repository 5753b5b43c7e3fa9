//! A guest that does nothing but store to pod memory, from every virtual processor.
//!
//! It comes as a bzImage, so that the product boots it like any kernel: a setup header, and code
//! at the 64-bit entry point. It finds the pool as the last soft-reserved entry of the memory
//! map, maps it, starts the other processors, and increments one counter a processor for ever.
//! It uses so few instructions that it runs also where KVM cannot run a stock kernel.

use std::arch::global_asm;

use crate::counters::COUNTERS_AT;

/// Where the code is loaded.
const LOAD_AT: u32 = 16 << 20;
/// Memory that the image asks for.
const INIT_SIZE: u32 = 1 << 20;
const SECTOR: usize = 512;

// The image's code, assembled at no particular address: it refers to itself by differences, and
// to what is below 1 MiB by number (the trampoline at 0x8000, where nothing of a VMM's lies).
global_asm!(
    r#"
    .section .rodata.lupin_payload, "a", @progbits
    .globl lupin_payload_start
    .globl lupin_payload_end
    .code64
lupin_payload_start:
    /* rsi: boot_params. The last e820 entry that is soft reserved is the pool. */
    movzbl 0x1e8(%rsi), %ecx
    leaq 0x2d0(%rsi), %rdi
    xorl %eax, %eax
1:  cmpl $0xefffffff, 16(%rdi)
    jne 2f
    movq (%rdi), %rax
2:  addq $20, %rdi
    decl %ecx
    jnz 1b

    /* Its first 2 MiB become the second gibibyte of the identity map. */
    movq %cr3, %rdx
    andq $-4096, %rdx
    movq (%rdx), %rdx
    andq $-4096, %rdx
    movq 8(%rdx), %rdx
    andq $-4096, %rdx
    orq $0x83, %rax
    movq %rax, (%rdx)
    movl $0x40000000, %ebx
    invlpg (%rbx)

    /* The other processors begin at 0x8000 in real mode. */
    leaq 9f(%rip), %rsi
    movl $0x8000, %edi
    movl $(8f - 9f), %ecx
3:  movb (%rsi), %al
    movb %al, (%rdi)
    incq %rsi
    incq %rdi
    decl %ecx
    jnz 3b
    movq %cr3, %rax
    movl %eax, 0x8000 + (7f - 9f)
    movl $0xfee00000, %edx
    movl $0x000c4500, 0x300(%rdx)   /* INIT to all but this one */
    movl $0x000c4608, 0x300(%rdx)   /* start-up at page 8, likewise */

    /* Counter 0 for ever. */
    addq ${counters}, %rbx
4:  lock incq (%rbx)
    jmp 4b

    .code16
9:  cli
    movw %cs, %ax
    movw %ax, %ds
    lgdtl (6f - 9b)
    movl $0x20, %eax                /* PAE */
    movl %eax, %cr4
    movl (7f - 9b), %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx          /* EFER: long mode */
    rdmsr
    orl $0x100, %eax
    wrmsr
    movl %cr0, %eax
    orl $0x80000001, %eax           /* paging and protection at once */
    movl %eax, %cr0
    ljmpl $0x08, $(0x8000 + (5f - 9b))

    .code64
5:  movl $1, %eax
    lock xaddl %eax, 0x8000 + (9f - 9b)
    shll $6, %eax
    movl $0x40000000 + {counters}, %ebx
    addq %rax, %rbx
4:  lock incq (%rbx)
    jmp 4b

    .balign 8
    /* Flat: null, 64-bit code. */
3:  .quad 0
    .quad 0x00af9b000000ffff
6:  .word 15
    .long 0x8000 + (3b - 9b)
    .balign 8
7:  .long 0                         /* the page tables */
9:  .long 1                         /* the next counter */
8:
lupin_payload_end:
    .previous
    "#,
    counters = const COUNTERS_AT,
    options(att_syntax)
);

unsafe extern "C" {
    static lupin_payload_start: u8;
    static lupin_payload_end: u8;
}

fn code() -> &'static [u8] {
    let (start, end) = (&raw const lupin_payload_start, &raw const lupin_payload_end);
    let length = end.addr() - start.addr();
    // SAFETY: the two symbols are the ends of one read-only section of this program.
    unsafe { std::slice::from_raw_parts(start, length) }
}

/// The image, as a file's contents.
pub fn image() -> Vec<u8> {
    let mut image = vec![0; 2 * SECTOR];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    // The fields of the Linux/x86 boot protocol that a loader looks at.
    put(0x1f1, &[1]); // setup_sects
    put(0x1fe, &0xaa55u16.to_le_bytes());
    put(0x200, &[0xeb, 0x66]); // jump over the header
    put(0x202, b"HdrS");
    put(0x206, &0x020fu16.to_le_bytes()); // protocol
    put(0x211, &[1]); // loaded high
    put(0x230, &0x20_0000u32.to_le_bytes()); // alignment
    put(0x234, &[1]); // relocatable
    put(0x236, &1u16.to_le_bytes()); // has a 64-bit entry point
    put(0x238, &2047u32.to_le_bytes()); // longest command line
    put(0x22c, &0x7fff_ffffu32.to_le_bytes()); // highest initramfs
    put(0x258, &u64::from(LOAD_AT).to_le_bytes());
    put(0x260, &INIT_SIZE.to_le_bytes());
    // The 64-bit entry point lies 0x200 behind the start of the code.
    image.resize(3 * SECTOR, 0);
    image.extend_from_slice(code());
    image.resize(image.len().next_multiple_of(SECTOR), 0);
    image
}
