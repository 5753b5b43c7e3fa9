use super::*;
use alloc::vec;

fn samples() -> Vec<ToManager> {
    vec![
        ToManager::Hello {
            version: 1,
            node: 2,
            generation: 3,
            agent: "0.1.0".into(),
            kernel: "6.1.0".into(),
        },
        ToManager::Output {
            channel: 1,
            stderr: true,
            data: vec![0xff; MAX_CHUNK],
        },
        ToManager::Exited {
            channel: 1,
            status: ExecStatus::Code(0),
        },
    ]
}

#[test]
fn frames_survive_any_cut_of_the_stream() {
    let stream: Vec<u8> = samples().iter().flat_map(|m| encode(m).unwrap()).collect();
    for step in [1, 3, 11, 12, 13, 4096, stream.len()] {
        let mut decoder = Decoder::new();
        let mut out = Vec::new();
        for chunk in stream.chunks(step) {
            decoder.push(chunk);
            while let Some(message) = decoder.next_message::<ToManager>().unwrap() {
                out.push(message);
            }
        }
        assert_eq!(out, samples(), "step {step}");
    }
}

#[test]
fn every_damaged_byte_is_noticed_or_waits_for_more() {
    let frame = encode(&samples()[0]).unwrap();
    for at in 0..frame.len() {
        let mut bad = frame.clone();
        bad[at] ^= 0x10;
        let mut decoder = Decoder::new();
        decoder.push(&bad);
        if let Ok(Some(message)) = decoder.next_message::<ToManager>() {
            panic!("byte {at} gave {message:?}");
        }
    }
}

#[test]
fn an_endless_frame_is_refused_before_it_is_collected() {
    let mut decoder = Decoder::new();
    let mut head = encode(&samples()[2]).unwrap();
    head[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
    decoder.push(&head);
    assert_eq!(
        decoder.next_message::<ToManager>(),
        Err(FrameError::TooLong(u32::MAX as usize))
    );
    let too_long = ToManager::Output {
        channel: 1,
        stderr: false,
        data: vec![0; MAX_FRAME + 1],
    };
    assert!(matches!(encode(&too_long), Err(FrameError::TooLong(_))));
}
