//! Somebody who says the same thing over and over, whether it arrives or not: what a listener on the way hopes to hear.
//!
//! It keeps no count and waits for no answer.

use std::net::SocketAddr;
use std::time::Duration;

use super::{AbortOnDrop, echo::unspecified};
use crate::{LabError, Netns};

const EVERY: Duration = Duration::from_millis(1);

/// Says it once a millisecond; silent soon after it is dropped.
#[derive(Debug)]
pub struct Chatter {
    _task: AbortOnDrop<()>,
}

impl Chatter {
    /// From any port, so that nobody who has just been dropped is in the way: his socket is closed a moment later.
    pub fn start(from: &Netns, to: SocketAddr, said: Vec<u8>) -> Result<Self, LabError> {
        let socket = from.udp_socket(unspecified(to))?;
        let task = tokio::spawn(async move {
            let mut ticks = tokio::time::interval(EVERY);
            loop {
                ticks.tick().await;
                // That it cannot be sent is what is hoped for while there is no way.
                let _ = socket.send_to(&said, to).await;
            }
        });
        Ok(Self { _task: AbortOnDrop(task) })
    }
}
