//! WireGuard's keys as types: public ones that can be printed and compared, and secret ones that never are.
//!
//! A secret is wiped from memory when it is dropped and has no way into text but the key file. What other programs' keys
//! are refused for is here too: a key of low order agrees on a secret that everybody knows.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use wireguard_control::Key;
use zeroize::{Zeroize, Zeroizing};

/// Bytes of a key of Curve25519.
const LENGTH: usize = 32;

/// A public key: a point of Curve25519, in base64 as `wg` prints it.
///
/// ```
/// use podnet_wireguard::PublicKey;
/// let key: PublicKey = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=".parse()?;
/// assert_eq!(key.to_string(), "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=");
/// assert!("AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=".parse::<PublicKey>().is_err());
/// # Ok::<(), podnet_wireguard::InvalidKey>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PublicKey([u8; LENGTH]);

/// Why a text is no key. It never holds the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidKey {
    /// It is not base64 of 32 bytes, as `wg genkey` writes it.
    #[error("it is not the base64 form of 32 bytes (44 characters)")]
    Malformed,
    /// All its bytes are zero: WireGuard takes that for no key.
    #[error("all its bytes are zero, which WireGuard takes for no key")]
    Zero,
    /// It is a point of low order: whoever knows that shares every secret that is agreed with it.
    #[error("it is a point of low order: every secret agreed with it is known to all")]
    LowOrder,
    /// It is another way to write a point than the one that WireGuard writes: by it one key could pass for two.
    #[error("it is not the form in which WireGuard writes this key")]
    NotCanonical,
}

/// The points of low order (RFC 7748, section 6.1; libsodium's list), with the highest bit, which Curve25519 ignores, cleared.
const LOW_ORDER: [[u8; LENGTH]; 7] = [
    [0; LENGTH],
    {
        let mut one = [0; LENGTH];
        one[0] = 1;
        one
    },
    [
        0xe0, 0xeb, 0x7a, 0x7c, 0x3b, 0x41, 0xb8, 0xae, 0x16, 0x56, 0xe3, 0xfa, 0xf1, 0x9f, 0xc4, 0x6a, 0xda, 0x09,
        0x8d, 0xeb, 0x9c, 0x32, 0xb1, 0xfd, 0x86, 0x62, 0x05, 0x16, 0x5f, 0x49, 0xb8, 0x00,
    ],
    [
        0x5f, 0x9c, 0x95, 0xbc, 0xa3, 0x50, 0x8c, 0x24, 0xb1, 0xd0, 0xb1, 0x55, 0x9c, 0x83, 0xef, 0x5b, 0x04, 0x44,
        0x5c, 0xc4, 0x58, 0x1c, 0x8e, 0x86, 0xd8, 0x22, 0x4e, 0xdd, 0xd0, 0x9f, 0x11, 0x57,
    ],
    near_the_prime(0xec),
    near_the_prime(0xed),
    near_the_prime(0xee),
];

/// 2^255 - 19 is `ed ff .. ff 7f`.
const fn near_the_prime(lowest: u8) -> [u8; LENGTH] {
    let mut bytes = [0xff; LENGTH];
    bytes[0] = lowest;
    bytes[LENGTH - 1] = 0x7f;
    bytes
}

/// Whether it is a number below 2^255 - 19: Curve25519 ignores the highest bit, and takes the rest modulo that.
fn is_canonical(bytes: &[u8; LENGTH]) -> bool {
    bytes.iter().rev().lt(near_the_prime(0xed).iter().rev())
}

impl PublicKey {
    /// From bytes that another node or a device gave.
    ///
    /// # Errors
    /// [`InvalidKey::Zero`], [`InvalidKey::LowOrder`] and [`InvalidKey::NotCanonical`].
    pub fn from_bytes(bytes: [u8; LENGTH]) -> Result<Self, InvalidKey> {
        let mut point = bytes;
        point[LENGTH - 1] &= 0x7f;
        match LOW_ORDER.iter().position(|low| *low == point) {
            None if is_canonical(&bytes) => Ok(PublicKey(bytes)),
            None => Err(InvalidKey::NotCanonical),
            Some(0) => Err(InvalidKey::Zero),
            Some(_) => Err(InvalidKey::LowOrder),
        }
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8; LENGTH] {
        &self.0
    }

    /// What a device of ours holds, whoever put it there: a peer of low order must be seen to be taken away.
    pub(crate) fn of_device(bytes: [u8; LENGTH]) -> Self {
        PublicKey(bytes)
    }

    /// The name of a key that a device of ours holds.
    pub(crate) fn any(text: &str) -> Result<Self, InvalidKey> {
        Ok(PublicKey(*decode(text)?))
    }
}

impl FromStr for PublicKey {
    type Err = InvalidKey;

    fn from_str(text: &str) -> Result<Self, InvalidKey> {
        PublicKey::from_bytes(*decode(text)?)
    }
}

impl TryFrom<String> for PublicKey {
    type Error = InvalidKey;

    fn try_from(text: String) -> Result<Self, InvalidKey> {
        text.parse()
    }
}

impl From<PublicKey> for String {
    fn from(key: PublicKey) -> String {
        key.to_string()
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&Key(self.0).to_base64())
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

macro_rules! secret {
    ($name:ident, $what:literal) => {
        impl $name {
            /// From its 32 bytes, which the caller wipes.
            ///
            /// # Errors
            /// [`InvalidKey::Zero`].
            pub fn from_bytes(bytes: [u8; LENGTH]) -> Result<Self, InvalidKey> {
                let bytes = Zeroizing::new(bytes);
                if bytes.iter().all(|b| *b == 0) { Err(InvalidKey::Zero) } else { Ok($name(bytes)) }
            }

            /// For whoever hands it to a device.
            pub(crate) fn expose(&self) -> &[u8; LENGTH] {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = InvalidKey;

            /// From base64, as `wg` writes it.
            fn from_str(text: &str) -> Result<Self, InvalidKey> {
                $name::from_bytes(*decode(text)?)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str($what)
            }
        }
    };
}

/// A node's private key. It is neither printed nor serialised, and wiped when it is dropped.
///
/// ```
/// use podnet_wireguard::PrivateKey;
/// let key = PrivateKey::generate();
/// assert_eq!(format!("{key:?}"), "PrivateKey(redacted)");
/// ```
#[derive(Clone)]
pub struct PrivateKey(Zeroizing<[u8; LENGTH]>);

secret!(PrivateKey, "PrivateKey(redacted)");

impl PrivateKey {
    /// A new one, from the kernel's random numbers.
    pub fn generate() -> Self {
        let mut key = Key::generate_private();
        let private = PrivateKey(Zeroizing::new(key.0));
        key.0.zeroize();
        private
    }

    /// The public key that belongs to it.
    pub fn public_key(&self) -> PublicKey {
        let mut key = Key(*self.0);
        let public = key.get_public();
        key.0.zeroize();
        PublicKey(public.0)
    }

    /// As it stands in a key file.
    pub(crate) fn to_base64(&self) -> Zeroizing<String> {
        let mut key = Key(*self.0);
        let text = Zeroizing::new(key.to_base64());
        key.0.zeroize();
        text
    }
}

/// A key that all nodes share beside their own (flannel's `PSK`). It is neither printed nor serialised, and wiped when it is dropped.
#[derive(Clone)]
pub struct PresharedKey(Zeroizing<[u8; LENGTH]>);

secret!(PresharedKey, "PresharedKey(redacted)");

impl PresharedKey {
    /// Whether a device holds this one: takes as long whatever it holds.
    pub(crate) fn is(&self, bytes: &[u8; LENGTH]) -> bool {
        self.0.iter().zip(bytes).fold(0, |so_far, (a, b)| so_far | (a ^ b)) == 0
    }
}

/// Base64 of 32 bytes in its one written form.
fn decode(text: &str) -> Result<Zeroizing<[u8; LENGTH]>, InvalidKey> {
    let mut key = Key::from_base64(text).map_err(|_| InvalidKey::Malformed)?;
    let bytes = Zeroizing::new(key.0);
    let canonical = Zeroizing::new(key.to_base64());
    key.0.zeroize();
    if *canonical == text { Ok(bytes) } else { Err(InvalidKey::Malformed) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn case_15_zero_low_order_and_what_is_not_32_bytes_is_no_public_key() {
        let secret = x25519_dalek::StaticSecret::from(*PrivateKey::generate().expose());
        let shared = |bytes: [u8; 32]| *secret.diffie_hellman(&x25519_dalek::PublicKey::from(bytes)).as_bytes();
        for low in LOW_ORDER {
            for top in [0, 0x80] {
                let mut bytes = low;
                bytes[31] |= top;
                assert_eq!(shared(bytes), [0; 32], "{bytes:x?} is on the list for a reason");
                assert!(PublicKey::from_bytes(bytes).is_err());
                assert!(Key(bytes).to_base64().parse::<PublicKey>().is_err());
            }
        }
        // Another way to write the same point: nobody has such a key by honest means, and it would not be seen to be another's.
        let mut same = *PrivateKey::generate().public_key().as_bytes();
        let point = shared(same);
        same[31] |= 0x80;
        assert_eq!(shared(same), point);
        assert!(PublicKey::from_bytes(same).is_err());
        let honest = PrivateKey::generate().public_key();
        assert_ne!(shared(*honest.as_bytes()), [0; 32]);
        assert_eq!(honest.to_string().parse(), Ok(honest));
        let text = honest.to_string();
        for wrong in ["", "AAAA", &text[..43], &format!("{text}="), &format!(" {text}"), &text.replace('=', "B")] {
            assert_eq!(wrong.parse::<PublicKey>(), Err(InvalidKey::Malformed), "{wrong}");
        }
    }

    #[test]
    fn a_private_key_has_the_public_key_that_wg_says() {
        // From RFC 7748, section 6.1.
        let alice = "dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=".parse::<PrivateKey>().unwrap();
        assert_eq!(alice.public_key().to_string(), "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=");
        assert_eq!(alice.to_base64().as_str(), "dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=");
    }

    #[test]
    fn secrets_have_no_text() {
        let (private, psk) = (PrivateKey::generate(), PresharedKey::from_bytes([7; 32]).unwrap());
        assert_eq!(format!("{private:?} {psk:?}"), "PrivateKey(redacted) PresharedKey(redacted)");
        assert!(psk.is(&[7; 32]) && !psk.is(&[8; 32]));
        assert_eq!(PresharedKey::from_bytes([0; 32]).unwrap_err(), InvalidKey::Zero);
        let text = private.to_base64();
        let broken = format!("{}=", text.as_str()).parse::<PrivateKey>().unwrap_err();
        assert!(!broken.to_string().contains(text.as_str()));
    }
}
